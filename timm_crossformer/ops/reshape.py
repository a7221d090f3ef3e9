"""Grouped attention by reshaping alone, for maps of a known size: what exported and compiled graphs of one size hold.

No gather, and no mask where every group is full. Elsewhere the map is padded, and one constant hides the padding. No
tensor has more than 8 dimensions, the most that TensorRT takes, and a batch of open size is never computed with.
"""
from math import prod
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import computed_once, is_known
from .grouping import Layout
from .reference import NEVER, pair_bias


def is_full(height: int, width: int, rows: Layout, cols: Layout) -> bool:
    """Return whether all members of all groups of a map exist."""
    return prod(rows) == height and prod(cols) == width


def grouped_attention(qkv: Tensor, table: Tensor, num_heads: int, rows: Layout, cols: Layout) -> Tensor:
    """Attend inside the groups of a map of known height and width; see `ops.grouped_attention`."""
    H, W = qkv.shape[1:3]
    q, k, v = (group(x, num_heads, rows, cols) for x in pad(qkv, rows, cols).chunk(3, -1))
    bias = computed_once(pair_bias(table, rows[1], cols[1]).to(q.dtype))
    x = ungroup(attend(q * q.shape[-1] ** -0.5, k, v, bias, padding(H, W, rows, cols, qkv)), rows, cols)
    return x[:, :H, :W]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Attend inside groups.

    Args:
        q: Queries of every group, scaled [B * groups, heads, N, head_dim].
        k: Keys, alike.
        v: Values, alike.
        bias: Of every pair of members [..., heads or 1, N, N].
        mask: Of keys that do not exist [groups, 1, 1, N], or None; see `padding`.

    Returns:
        [B * groups, heads, N, head_dim]
    """
    scores = q @ k.transpose(-2, -1) + bias
    if mask is not None and is_known(scores.shape[0]):
        images = scores.shape[0] // len(mask)
        scores = scores + (mask if images == 1 else mask.repeat(images, 1, 1, 1))
    elif mask is not None:
        scores = (scores.view(-1, len(mask), *scores.shape[1:]) + mask).view(-1, *scores.shape[1:])
    return scores.softmax(dim=-1) @ v


def pad(x: Tensor, rows: Layout, cols: Layout) -> Tensor:
    """Continue tokens x [B, H, W, C] with zeros until all members of all groups exist."""
    H, W = x.shape[1:3]
    return x if is_full(H, W, rows, cols) else F.pad(x, [0, 0, 0, prod(cols) - W, 0, prod(rows) - H])


def group(x: Tensor, num_heads: int, rows: Layout, cols: Layout) -> Tensor:
    """Move tokens [B, H, W, C] that all groups are full of into these: [B * groups, heads, N, C // heads]."""
    axes = _axes(num_heads, x.shape[-1], rows, cols)
    x = x.contiguous().view(-1, *(axes[name] for name in _MAP[1:] if axes[name] > 1))
    return x.permute(_order(axes, _MAP, _GROUPS)).contiguous().view(
        -1, num_heads, rows[1] * cols[1], axes['head_dim'])


def ungroup(x: Tensor, rows: Layout, cols: Layout) -> Tensor:
    """Undo `group`."""
    num_heads, channels = x.shape[1], x.shape[1] * x.shape[3]
    axes = _axes(num_heads, channels, rows, cols)
    x = x.contiguous().view(-1, *(axes[name] for name in _GROUPS[1:] if axes[name] > 1))
    return x.permute(_order(axes, _GROUPS, _MAP)).contiguous().view(-1, prod(rows), prod(cols), channels)


# The axes of a map, and of its groups. Batch and regions of rows stay together, and first.
_MAP = ('rows', 'member_h', 'phase_h', 'region_w', 'member_w', 'phase_w', 'head', 'head_dim')
_GROUPS = ('rows', 'phase_h', 'region_w', 'phase_w', 'head', 'member_h', 'member_w', 'head_dim')


def _axes(num_heads: int, channels: int, rows: Layout, cols: Layout) -> Dict[str, int]:
    return dict(
        rows=rows[0], member_h=rows[1], phase_h=rows[2], region_w=cols[0], member_w=cols[1], phase_w=cols[2],
        head=num_heads, head_dim=channels // num_heads)


def _order(axes: Dict[str, int], before: Tuple[str, ...], after: Tuple[str, ...]) -> List[int]:
    """Say how to permute axes; but for the first, those of length 1 are left out."""
    real = [name for i, name in enumerate(before) if i == 0 or axes[name] > 1]
    return [real.index(name) for name in after if name in real]


def padding(height: int, width: int, rows: Layout, cols: Layout, like: Tensor) -> Optional[Tensor]:
    """Mask keys beyond the map: [groups, 1, 1, N], 0 where they exist, else far below any score; None without any."""
    if is_full(height, width, rows, cols):
        return None
    real: List[Tensor] = []
    for n, (regions, size, interval) in ((height, rows), (width, cols)):
        token = torch.arange(regions * size * interval, device=like.device)
        real.append((token < n).view(regions, size, interval).transpose(1, 2).reshape(-1, size))  # groups, members
    mask = torch.logical_not(real[0][:, None, :, None] & real[1][None, :, None, :]).flatten(2).flatten(0, 1)
    return (mask.to(like.dtype) * NEVER)[:, None, None, :]
