"""Inference on wide maps, part by part.

A whole map would go to main memory and back at every step of a block. A part holds whole groups, so that attention does
not notice, and everything else between two residuals treats each token by itself.
"""
from typing import Any, Iterable, Iterator, List, Tuple, cast

import torch
from timm.layers import GELU, DropPath, LayerNorm, Mlp, RmsNorm
from torch import Tensor, nn

from ..ops.grouping import Layout
from .attention import GroupAttention
from .block import CrossFormerBlock
from .plain import is_eager_inference, is_plain, is_watched
from .position_bias import DynamicPosBias, OffsetLinear

# Numbers of a map in a part, 2 MiB in fp32 and four times as much within the MLP: above 32 MiB glibc maps fresh pages
# for every result, at the cost of a fault each.
_PART = 1 << 19

# What treats every token of a map by itself, and in evaluation alike.
_TOKENWISE = (
    GroupAttention, DynamicPosBias, OffsetLinear, Mlp, nn.Sequential, nn.Linear, nn.LayerNorm,
    nn.RMSNorm, LayerNorm, RmsNorm, nn.GELU, GELU, nn.ReLU, nn.SiLU, nn.Dropout, DropPath, nn.Identity,
)


def goes_in_parts(blocks: nn.Sequential, x: Tensor) -> bool:
    """Return whether tokens x [B, H, W, C] should pass through blocks a part at a time: inference on a CPU."""
    if not is_eager_inference(x) or x.device.type != 'cpu':
        return False
    if x.numel() <= 2 * _PART:  # two parts are not worth their overhead
        return False
    return type(blocks) is nn.Sequential and not is_watched(blocks) and all(
        type(block) is CrossFormerBlock and not block.training and not is_watched(block) and all(
            is_plain(part, _TOKENWISE) for name, part in block.named_children() if name != 'cooling')
        for block in blocks)


def add_in_parts(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """Pass tokens x [B, H, W, C] through blocks in evaluation, as the blocks themselves would."""
    for block in cast(Iterable[Any], blocks):
        attn = block.attn
        rows, cols = attn.layouts(x.shape[1], x.shape[2])
        table = attn.bias_table(x, rows, cols)
        out = torch.empty(x.shape, dtype=x.dtype)
        for place, part_rows, part_cols in parts(x, rows, cols):
            part = x[place]
            part = part + attn.attend(block.norm1(part), part_rows, part_cols, table)
            # A group larger than a part is whole for attention only.
            few = max(1, _PART // part[:, 0].numel())
            for tokens, into in zip(part.split(few, 1), out[place].split(few, 1), strict=True):
                torch.add(tokens, block.mlp(block.norm2(tokens)), out=into)
        x = block.cooling(out)
    return x


def parts(x: Tensor, rows: Layout, cols: Layout) -> Iterator[Tuple[Tuple[slice, slice, slice], Layout, Layout]]:
    """Cut tokens x [B, H, W, C] into parts of about `_PART` numbers that hold whole groups, the larger where need be.

    Yields:
        Place of a part in x, and the layouts of its rows and columns.
    """
    B, H, W, C = x.shape
    images = max(1, _PART // (H * W * C))
    row_parts = _cut(H, rows, _PART // (W * C))
    # One part of the rows may still be too much: the first one is the longest.
    start, stop, step = row_parts[0][0].indices(H)
    col_parts = _cut(W, cols, _PART // (len(range(start, stop, step)) * C))
    for image in range(0, B, images):
        for row, row_layout in row_parts:
            for col, col_layout in col_parts:
                yield (slice(image, image + images), row, col), row_layout, col_layout


def _cut(n: int, layout: Layout, most: int) -> List[Tuple[slice, Layout]]:
    """Cut an axis of n tokens into parts of whole groups and about `most` tokens: a few regions each, or one phase."""
    regions, size, interval = layout
    if n <= most:
        return [(slice(0, n), layout)]
    if regions > 1:
        few = max(1, most // (size * interval))
        return [
            (slice(first * size * interval, min(n, (first + few) * size * interval)), (few, size, interval))
            for first in range(0, regions, few) if first * size * interval < n]
    return [(slice(phase, n, interval), (1, size, 1)) for phase in range(min(interval, n))]
