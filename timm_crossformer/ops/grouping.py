"""Which tokens attend to each other: the groups of short- and long-distance attention (paper, section 3.2).

Along one axis of n tokens every published grouping is one `Layout` (regions, size, interval): token

    region * size * interval  +  member * interval  +  phase

is the given member of the group (region, phase). SDA has interval 1, so neighbours form a group. LDA has an interval
above 1, so a group is spread out. A group of the map is the product of a group of rows and a group of columns.
"""
from typing import Any, List, Tuple

import torch
from torch import Tensor

from .._torch import is_exported, is_known, is_one_graph_for_all_sizes

Layout = Tuple[int, int, int]  # regions, size, interval
Segment = Tuple[int, int, int, int, int]  # start, regions, size, interval, phases

LDA_GROUPINGS = ('map', 'region', 'grid')


def nearest_divisor(n: int, size: int) -> int:
    """Return the divisor of `n` in [size / 2, 2 * size] nearest to `size` (the smaller on a tie), or `size` if none."""
    if not torch.jit.is_scripting() and torch.jit.is_tracing():
        return _trace_divisor(n, size)
    best = 0
    for d in range((size + 1) // 2, 2 * size + 1):
        if n % d == 0 and (best == 0 or abs(d - size) < abs(best - size)):
            best = d
    return best if best > 0 else size


@torch.jit.unused
def _trace_divisor(n: int, size: int) -> int:
    """Choose as `nearest_divisor` does, without a branch: a trace keeps the choice, and not what came of it."""
    candidates = sorted(range((size + 1) // 2, 2 * size + 1), key=lambda d: (abs(d - size), d))
    rests: Any = torch.stack([torch.as_tensor(n % d) for d in [*candidates, 1]])
    return torch.tensor([*candidates, size])[(rests == 0).long().argmax()]  # type: ignore[return-value]  # the first


def axis_layout(n: int, group_size: int, interval: int, grouping: str, fit: bool) -> Layout:
    """Lay out one axis for one kind of attention.

    Args:
        n: Tokens along the axis.
        group_size: Tokens per group along the axis, G.
        interval: Distance of neighbours in a group, I. `grid` chooses its own.
        grouping: 'sda', or for LDA 'map' (I * I groups over the whole map), 'region' (G x G groups inside regions of
            G * I tokens) or 'grid' (G tokens spread over the map).
        fit: Replace G by the nearest divisor of n, and I by n / G where the grouping follows from G.

    Returns:
        Regions, size, interval. Together they cover at least n tokens; those from n on do not exist.
    """
    if fit and grouping != 'map':
        group_size = nearest_divisor(n, group_size)
        divides = 1 // (1 + n % group_size)  # 1 or 0: no branch, as below
        interval = interval + divides * (n // group_size - interval)
    if grouping == 'sda':
        return (n + group_size - 1) // group_size, group_size, 1
    if grouping == 'region':
        return (n + group_size * interval - 1) // (group_size * interval), group_size, interval
    if grouping == 'map':
        return 1, (n + interval - 1) // interval, interval
    return 1, group_size, (n + group_size - 1) // group_size  # grid


def map_layout(
        height: int,
        width: int,
        group_size: Tuple[int, int],
        interval: int,
        grouping: str,
        fit: bool = False,
) -> Tuple[Layout, Layout]:
    """Lay out the rows and the columns of a map; a map no larger than one group on a side stays one whole group.

    The official classifier makes square windows of min(H, W) there, its dense code one window of max(H, W) with masked
    padding. Attention over the true H x W rectangle equals both wherever they run.
    """
    rows = axis_layout(height, group_size[0], interval, grouping, fit)
    cols = axis_layout(width, group_size[1], interval, grouping, fit)
    if not torch.jit.is_scripting() and is_one_graph_for_all_sizes():
        # Without a branch. The product is 0 exactly if one side fits into a group.
        whole = 1 // (1 + (height // (group_size[0] + 1)) * (width // (group_size[1] + 1)))
        return _opaque(_blend(rows, height, whole)), _opaque(_blend(cols, width, whole))
    if height <= group_size[0] or width <= group_size[1]:
        return (1, height, 1), (1, width, 1)
    return rows, cols


def _blend(layout: Layout, n: int, whole: int) -> Layout:
    """Return the layout (1, n, 1) if `whole` is 1, else `layout`."""
    regions, size, interval = layout
    return regions + whole * (1 - regions), size + whole * (n - size), interval + whole * (1 - interval)


@torch.jit.unused
def _opaque(layout: Layout) -> Layout:
    """In an export, hide how a layout follows from the size of the map: it would carry the formulas everywhere."""
    if not is_exported() or is_known(*layout):  # or one size is exported
        return layout
    hidden: List[Any] = [torch.scalar_tensor(n, dtype=torch.long).item() for n in layout]
    for n in hidden:
        torch._check(n >= 1)
    return hidden[0], hidden[1], hidden[2]


def axis_segments(n: int, layout: Layout) -> List[Segment]:
    """Cut an axis into runs whose groups are all equally long, so that no group holds a token that does not exist.

    Returns:
        Segments (start, regions, size, interval, phases): token start + region * size * interval + member * interval
        + phase. Full regions come first. What is left over may need two segments: the first `rest % interval` phases
        have one member more than the others.
    """
    _, size, interval = layout
    segments: List[Segment] = []
    full = n // (size * interval)
    if full > 0:
        segments.append((0, full, size, interval, interval))
    start = full * size * interval
    members, longer = (n - start) // interval, (n - start) % interval
    if longer > 0:
        segments.append((start, 1, members + 1, interval, longer))
    if members > 0:
        segments.append((start + longer, 1, members, interval, interval - longer))
    return segments


def group_view(x: Tensor, rows: Segment, cols: Segment) -> Tensor:
    """View the tokens of two segments as groups; writing into the view writes into `x`.

    Args:
        x: Tokens [B, H, W, C].
        rows: Segment of the H axis.
        cols: Segment of the W axis.

    Returns:
        View [B, row regions, row phases, column regions, column phases, gh, gw, C].
    """
    x = _split_axis(x, 1, rows)  # B, regions_h, gh, phases_h, W, C
    x = _split_axis(x, 4, cols)  # B, regions_h, gh, phases_h, regions_w, gw, phases_w, C
    return x.permute(0, 1, 3, 4, 6, 2, 5, 7)


def _split_axis(x: Tensor, dim: int, segment: Segment) -> Tensor:
    """Split one axis into regions, members and phases. Always a view."""
    start, regions, size, interval, phases = segment
    if phases == interval:
        return x.narrow(dim, start, regions * size * interval).unflatten(dim, [regions, size, interval])
    # Part of the phases of the one last region: windows of `phases` neighbours, one every `interval` tokens.
    x = x.narrow(dim, start, (size - 1) * interval + phases).unfold(dim, phases, interval)
    return x.movedim(-1, dim + 1).unsqueeze(dim)


def group_index(
        height: int,
        width: int,
        rows: Layout,
        cols: Layout,
        device: torch.device,
) -> Tuple[Tensor, Tensor, Tensor]:
    """List the tokens of every group: grouping without a branch or a loop that depends on the size of the map.

    Args:
        height: Rows of the map.
        width: Columns of the map.
        rows: Layout of the rows.
        cols: Layout of the columns.
        device: Where to build the index.

    Returns:
        Index of each group's tokens among the H * W tokens, [nG, N]; where a token does not exist, of another one.
        Mask [nG, N], True on tokens that exist.
        Index of each of the H * W tokens among the nG * N members.
    """
    row, row_real, row_group, row_member = _axis_index(height, rows, device)
    col, col_real, col_group, col_member = _axis_index(width, cols, device)
    index = row[:, None, :, None] * width + col[None, :, None, :]  # groups_h, groups_w, gh, gw
    real = row_real[:, None, :, None] & col_real[None, :, None, :]
    group = row_group[:, None] * (cols[0] * cols[2]) + col_group  # H, W
    member = row_member[:, None] * cols[1] + col_member
    inverse = group * (rows[1] * cols[1]) + member
    return index.flatten(0, 1).flatten(1), real.flatten(0, 1).flatten(1), inverse.flatten()


def _axis_index(n: int, layout: Layout, device: torch.device) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return token and its existence by (group, member), then group and member by token."""
    regions, size, interval = layout
    group = torch.arange(regions * interval, device=device)[:, None]
    member = torch.arange(size, device=device)[None, :]
    region, phase = divide(group, interval)
    token = region * (size * interval) + member * interval + phase
    real = torch.arange(n, device=device)
    region, rest = divide(real, size * interval)
    member_of, phase = divide(rest, interval)
    return token.clamp(max=n - 1), token < n, region * interval + phase, member_of


def divide(x: Tensor, n: int) -> Tuple[Tensor, Tensor]:
    """Return quotient and remainder (the remainder operator has no ONNX form for a symbolic n)."""
    quotient = x // n
    return quotient, x - quotient * n
