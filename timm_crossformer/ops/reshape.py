"""Grouped attention by reshaping alone, for maps of a known size: what exported and compiled graphs of one size hold.

No gather, and no mask where every group is full. Elsewhere the map is padded, and one constant hides the padding.
"""
from math import prod
from typing import List

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .grouping import Layout
from .reference import NEVER, pair_bias


def is_full(height: int, width: int, rows: Layout, cols: Layout) -> bool:
    """Return whether all members of all groups of a map exist."""
    return prod(rows) == height and prod(cols) == width


def grouped_attention(qkv: Tensor, table: Tensor, num_heads: int, rows: Layout, cols: Layout) -> Tensor:
    """Attend inside the groups of a map of known height and width; see `ops.grouped_attention`."""
    return attend(qkv, pair_bias(table, rows[1], cols[1]), num_heads, rows, cols)


def attend(qkv: Tensor, bias: Tensor, num_heads: int, rows: Layout, cols: Layout) -> Tensor:
    """Attend inside groups with the bias of every pair of members [heads or 1, N, N]; else as `grouped_attention`."""
    _, H, W, _ = qkv.shape
    full = is_full(H, W, rows, cols)
    if not full:
        qkv = F.pad(qkv, [0, 0, 0, prod(cols) - W, 0, prod(rows) - H])
    axes = dict(zip(('rr', 'gh', 'ri', 'cr', 'gw', 'ci'), (*rows, *cols), strict=True))  # region, member, phase
    q, k, v = rearrange(
        qkv, 'b (rr gh ri) (cr gw ci) (qkv heads d) -> qkv (b rr ri cr ci) heads (gh gw) d',
        qkv=3, heads=num_heads, **axes).unbind(0)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias.to(q.dtype)
    if not full:
        mask = _padding(H, W, rows, cols, qkv)
        scores = (scores.unflatten(0, [-1, len(mask)]) + mask).flatten(0, 1)
    x = rearrange(
        scores.softmax(dim=-1) @ v, '(b rr ri cr ci) heads (gh gw) d -> b (rr gh ri) (cr gw ci) (heads d)', **axes)
    return x if full else x[:, :H, :W]


def _padding(height: int, width: int, rows: Layout, cols: Layout, like: Tensor) -> Tensor:
    """Mask keys beyond the map: [groups, 1, 1, N], 0 where they exist, else far below any score."""
    real: List[Tensor] = []
    for n, (regions, size, interval) in ((height, rows), (width, cols)):
        token = torch.arange(regions * size * interval, device=like.device)
        real.append((token < n).view(regions, size, interval).transpose(1, 2).reshape(-1, size))  # groups, members
    mask = torch.logical_not(real[0][:, None, :, None] & real[1][None, :, None, :]).flatten(2).flatten(0, 1)
    return (mask.to(like.dtype) * NEVER)[:, None, None, :]
