"""Grouped attention by one gather of tokens, a mask, and one gather back: the oracle, and what every tracer sees.

No branch and no loop depends on the size of the map, so one traced or exported graph serves every size.
"""
import math
from typing import Tuple

import torch
from einops import rearrange
from torch import Tensor

from .grouping import Layout, divide, group_index

# Added to scores of keys that do not exist: far below any, yet finite in fp16, so that a group without a real token
# keeps finite gradients.
NEVER = -3e4


def grouped_attention(qkv: Tensor, table: Tensor, num_heads: int, rows: Layout, cols: Layout) -> Tensor:
    """Attend inside the groups of a map; see `ops.grouped_attention`."""
    q, k, v, bias, mask, place = open_groups(qkv, table, num_heads, rows, cols)
    attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias + mask
    return close_groups(attn.softmax(dim=-1) @ v, place)


def attention_and_logsumexp(
        qkv: Tensor, table: Tensor, num_heads: int, rows: Layout, cols: Layout) -> Tuple[Tensor, Tensor]:
    """Attend, and return what `triton.forward` saves beside the result: [B, H, W, num_heads]."""
    q, k, v, bias, mask, place = open_groups(qkv, table, num_heads, rows, cols)
    attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias + mask
    logsumexp = attn.float().logsumexp(dim=-1, keepdim=True) / math.log(2)
    return close_groups(attn.softmax(dim=-1) @ v, place), close_groups(logsumexp, place)


def open_groups(
        qkv: Tensor,
        table: Tensor,
        num_heads: int,
        rows: Layout,
        cols: Layout,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gather the tokens of every group.

    Args:
        (all): See `ops.grouped_attention`.

    Returns:
        Queries, keys and values, each [B * groups, heads, N, head_dim], where N tokens is a full group.
        Bias of every pair [heads or 1, N, N].
        Mask [B * groups, 1, 1, N]: 0 for keys that exist, else far below any score.
        Place of each token among the members of all groups [B, H, W].
    """
    B, H, W, _ = qkv.shape
    gh, gw = rows[1], cols[1]
    index, real, inverse = group_index(H, W, rows, cols, qkv.device)  # [groups, N], [groups, N], [H * W]
    members = qkv.flatten(1, 2).index_select(1, index.flatten()).unflatten(1, [-1, gh * gw]).flatten(0, 1)
    if torch.jit.is_scripting():  # TorchScript does not read the line below
        q, k, v = members.unflatten(-1, [3, num_heads, -1]).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = rearrange(members, 'g n (qkv heads d) -> qkv g heads n d', qkv=3, heads=num_heads)
    mask = ((~real).to(qkv.dtype) * -3e4)[:, None, None, :].repeat(B, 1, 1, 1)
    place = torch.arange(B, device=qkv.device)[:, None, None] * index.numel() + inverse.unflatten(0, [H, W])
    return q, k, v, pair_bias(table, gh, gw).to(qkv.dtype), mask, place


def close_groups(x: Tensor, place: Tensor) -> Tensor:
    """Put tokens [B * groups, heads, N, head_dim] back on the map: [B, H, W, heads * head_dim]."""
    x = x.transpose(1, 2).flatten(2).flatten(0, 1)
    return x.index_select(0, place.flatten()).unflatten(0, place.shape)


def pair_bias(table: Tensor, gh: int, gw: int) -> Tensor:
    """Look up the bias of every pair of tokens of a group: [heads or 1, N, N] from a table of offsets."""
    row, col = divide(torch.arange(gh * gw, device=table.device), gw)
    TH, TW = (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2
    # Only pairs that do not exist can lie beyond a table that is just large enough for those that do.
    dy = (row[:, None] - row + TH - 1).clamp(0, 2 * TH - 2)
    dx = (col[:, None] - col + TW - 1).clamp(0, 2 * TW - 2)
    offset = dy * (2 * TW - 1) + dx
    return table.flatten(1).index_select(1, offset.flatten()).reshape(-1, gh * gw, gh * gw)
