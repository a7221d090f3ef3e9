"""Grouped attention on a CPU: runs of equally long groups, so that nothing is padded and nothing is masked."""
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .grouping import Layout, axis_segments, group_view

# In groups of up to so many tokens PyTorch's fused kernel gains little from further threads, and plain products win.
_FEW_TOKENS = 64
# With more tokens the biases of all pairs take longer to build, in memory, than attention itself, in the cache.
_MANY_TOKENS = 512
# Pairs of a tile, 4 MiB in fp32; in the backward pass, which holds several such, pairs of all heads at a time.
_TILE = 1 << 20


def forward(  # TorchScript takes a constant of the file as a default only
        qkv: Tensor,
        table: Tensor,
        num_heads: int,
        rows: Layout,
        cols: Layout,
        many: int = _MANY_TOKENS,
) -> Tensor:
    """Attend inside the groups of a map; see `ops.grouped_attention`. TorchScript compiles this, on any device."""
    B, H, W, C = qkv.shape
    out = qkv.new_empty([B, H, W, C // 3])
    for row in axis_segments(H, rows):
        for col in axis_segments(W, cols):
            q, k, v = split_heads(group_view(qkv, row, col), 3, num_heads).unbind(0)
            if row[2] * col[2] > many:
                x = _attend_in_tiles(q, k, v, table, row[2], col[2])
            else:
                x = _attend(q, k, v, expand_bias(table, row[2], col[2]).to(qkv.dtype))
            write_heads(group_view(out, row, col), x)
    return out


def split_heads(groups: Tensor, parts: int, num_heads: int) -> Tensor:
    """Copy a `group_view` [B, ..., gh, gw, parts * C] into [parts, groups, heads, gh * gw, head_dim]."""
    B, rh, ph, rw, pw, gh, gw, channels = groups.shape
    head_dim = channels // (parts * num_heads)
    heads = groups.unflatten(7, [parts, num_heads, head_dim]).permute(7, 0, 1, 2, 3, 4, 8, 5, 6, 9)
    return heads.reshape(parts, B * rh * ph * rw * pw, num_heads, gh * gw, head_dim)


def write_heads(groups: Tensor, x: Tensor) -> None:
    """Write tokens [groups, heads, gh * gw, head_dim] into a `group_view` [B, ..., gh, gw, C]."""
    B, rh, ph, rw, pw, gh, gw, _ = groups.shape
    heads, head_dim = x.shape[1], x.shape[3]
    x = x.reshape(B, rh, ph, rw, pw, heads, gh, gw, head_dim).permute(0, 1, 2, 3, 4, 6, 7, 5, 8)
    groups.unflatten(7, [heads, head_dim]).copy_(x)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attend within groups: q, k and v [groups, heads, N, head_dim], bias [heads or 1, N, N]."""
    if not torch.jit.is_scripting() and _suits_products(q):
        scores = bias.repeat(q.shape[0] * q.shape[1] // len(bias), 1, 1)  # products add to them, a pass less
        keys = k.flatten(0, 1).transpose(1, 2)
        torch.baddbmm(scores, q.flatten(0, 1), keys, alpha=q.shape[-1] ** -0.5, out=scores)  # PyTorch counts this name
        return (scores.softmax(dim=-1) @ v.flatten(0, 1)).view(q.shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))


@torch.jit.unused
def _suits_products(q: Tensor) -> bool:
    return q.dtype == torch.float32 and q.shape[2] <= _FEW_TOKENS and torch.get_num_threads() > 1


def _attend_in_tiles(
        q: Tensor, k: Tensor, v: Tensor, table: Tensor, gh: int, gw: int, pairs: int = _TILE) -> Tensor:
    """Attend within large groups a few rows of queries at a time, with biases as a view of the table of offsets."""
    dtype, N = q.dtype, gh * gw
    q, k, v = promote(q), promote(k).flip([2]).transpose(2, 3), promote(v).flip([2])  # keys as biases have them
    q = q * q.shape[3] ** -0.5
    biases = bias_windows(table.to(q.dtype), gh, gw).expand(q.shape[1], -1, -1, -1, -1)
    x = torch.empty_like(q)
    tiles = (N * N + pairs - 1) // pairs
    rows = (gh + tiles - 1) // tiles
    for group in range(q.shape[0]):
        for head in range(q.shape[1]):
            for first in range(0, gh, rows):
                tile = slice(first * gw, min(first + rows, gh) * gw)
                scores = q[group, head, tile] @ k[group, head]
                scores.view(-1, gw, gh, gw).add_(biases[head, first:first + rows])
                x[group, head, tile] = scores.softmax(dim=-1) @ v[group, head]
    return x.to(dtype)


def promote(x: Tensor) -> Tensor:
    """Bring half precision to fp32, in which sums are taken."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def bias_windows(table: Tensor, height: int, width: int) -> Tensor:
    """View a table of offsets as biases of pairs of tokens, the keys in reverse order.

    Args:
        table: Biases [heads, 2 * TH - 1, 2 * TW - 1] for groups of at least height x width tokens.
        height: Rows of the group.
        width: Columns of the group.

    Returns:
        View [heads, query rows, query columns, key rows, key columns], the keys of both axes from last to first.
    """
    top, left = (table.shape[1] + 1) // 2 - height, (table.shape[2] + 1) // 2 - width
    # Key row k of query row r has table row height - 1 + r - k. With k counted from the last, that is r + k: a window
    # for each query.
    table = table[:, top:top + 2 * height - 1, left:left + 2 * width - 1]
    return table.unfold(1, height, 1).unfold(2, width, 1)


def expand_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Spread a table of offsets over pairs of tokens: [heads, height * width, height * width]; see `bias_windows`."""
    N = height * width
    return bias_windows(table, height, width).flip([3, 4]).reshape(table.shape[0], N, N)


def backward(
        grad: Tensor,
        qkv: Tensor,
        table: Tensor,
        num_heads: int,
        rows: Layout,
        cols: Layout,
) -> Tuple[Tensor, Tensor]:
    """Return the gradients of qkv and of the table; probabilities are computed again, a few groups at a time."""
    _, H, W, C = qkv.shape
    d_qkv = qkv.new_empty(qkv.shape)
    d_table = torch.zeros(table.shape, dtype=promote(qkv[:0]).dtype, device=table.device)
    scale = (C // 3 // num_heads) ** -0.5
    for row in axis_segments(H, rows):
        for col in axis_segments(W, cols):
            q, k, v = promote(split_heads(group_view(qkv, row, col), 3, num_heads))
            g = promote(split_heads(group_view(grad, row, col), 1, num_heads)[0])
            gh, gw = row[2], col[2]
            pairs = num_heads * gw * gh * gw  # of one row of queries
            step, band = max(1, _TILE // (pairs * gh)), max(1, _TILE // pairs)
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            biases = bias_windows(table.to(q.dtype), gh, gw).flip([3, 4])
            for first in range(0, gh, band):
                last = min(first + band, gh)
                place = slice(first * gw, last * gw)
                bias = biases[:, first:last].flatten(3).flatten(1, 2)
                d_bias = torch.zeros_like(bias)
                for some in (slice(i, i + step) for i in range(0, len(q), step)):
                    qs, gs = q[some, :, place], g[some, :, place]
                    attn = (qs @ k[some].transpose(-2, -1)).mul_(scale).add_(bias).softmax(dim=-1)
                    dv[some] += attn.transpose(-2, -1) @ gs
                    d_attn = gs @ v[some].transpose(-2, -1)
                    d_attn = (d_attn - (d_attn * attn).sum(-1, keepdim=True)).mul_(attn)
                    dq[some, :, place] = (d_attn @ k[some]).mul_(scale)
                    dk[some] += (d_attn.transpose(-2, -1) @ qs).mul_(scale)
                    d_bias += d_attn.sum(0) if len(table) == num_heads else d_attn.sum((0, 1))
                _fold_bias(d_table, d_bias, gh, gw, first)
            write_heads(group_view(d_qkv, row, col), torch.cat([dq, dk, dv], dim=1))
    return d_qkv, d_table.to(table.dtype)


def _fold_bias(d_table: Tensor, d_bias: Tensor, height: int, width: int, first_row: int) -> None:
    """Add the gradients of pairs [heads, queries, height * width] to those of their offsets: undo `expand_bias`."""
    TH, TW = (d_table.shape[1] + 1) // 2, (d_table.shape[2] + 1) // 2
    query = torch.arange(d_bias.shape[1], device=d_bias.device)[:, None] + first_row * width
    key = torch.arange(height * width, device=d_bias.device)
    dy, dx = query // width - key // width + TH - 1, query % width - key % width + TW - 1
    offset = (dy * (2 * TW - 1) + dx).flatten().expand(len(d_table), -1)
    d_table.view(len(d_table), -1).scatter_add_(1, offset, d_bias.flatten(1))
