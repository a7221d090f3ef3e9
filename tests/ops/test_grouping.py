"""Groups against loops written from the paper, at awkward sizes."""
import itertools

import pytest
import torch
from common import slow_axis_groups, slow_groups
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_crossformer.ops.grouping import (
    axis_layout,
    axis_segments,
    group_index,
    group_view,
    map_layout,
    nearest_divisor,
)

GROUPINGS = ('sda', 'map', 'region', 'grid')
SIZES = [
    (1, 1), (1, 9), (3, 3), (4, 4), (5, 5), (4, 17), (8, 8), (9, 13), (16, 16), (17, 31), (23, 5), (24, 40), (33, 33)]


def tokens(h, w):
    """Number the tokens of a map: [1, H, W, 1]."""
    return torch.arange(h * w).view(1, h, w, 1)


def segments(h, w, size, interval, grouping, fit=False):
    rows, cols = map_layout(h, w, size, interval, grouping, fit)
    return axis_segments(h, rows), axis_segments(w, cols)


def groups_of_segments(h, w, size, interval, grouping, fit=False):
    rows, cols = segments(h, w, size, interval, grouping, fit)
    groups = []
    for row, col in itertools.product(rows, cols):
        groups += group_view(tokens(h, w), row, col).reshape(-1, row[2] * col[2]).tolist()
    return groups


def as_tokens(groups, w):
    return {tuple((t // w, t % w) for t in group) for group in groups}


@pytest.mark.parametrize('grouping', GROUPINGS)
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize(
    ('group', 'interval'), [((4, 4), 4), ((4, 4), 1), ((3, 5), 2), ((7, 7), 8), ((1, 1), 3)], ids=str)
def test_members_match_the_slow_loop(size, group, interval, grouping):
    h, w = size
    expected = slow_groups(h, w, group, interval, grouping)
    groups = groups_of_segments(h, w, group, interval, grouping)
    assert as_tokens(groups, w) == expected
    assert sum(map(len, groups)) == h * w  # every token once, no padding
    rows, cols = map_layout(h, w, group, interval, grouping)
    index, real, inverse = group_index(h, w, rows, cols, torch.device('cpu'))
    indexed = [row[mask].tolist() for row, mask in zip(index, real, strict=True)]
    assert as_tokens([g for g in indexed if g], w) == expected
    assert torch.equal(index.flatten()[inverse], torch.arange(h * w))
    assert real.flatten()[inverse].all()


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 200), size=st.integers(1, 20), interval=st.integers(1, 16), grouping=st.sampled_from(GROUPINGS),
    fit=st.booleans())
def test_segments_cover_an_axis_once_with_equal_groups(n, size, interval, grouping, fit):
    layout = axis_layout(n, size, interval, grouping, fit)
    seen = []
    for start, regions, members, step, phases in axis_segments(n, layout):
        for region, member, phase in itertools.product(range(regions), range(members), range(phases)):
            seen.append(start + region * members * step + member * step + phase)
    assert sorted(seen) == list(range(n))
    if not fit:
        assert len(axis_segments(n, layout)) <= 3


@pytest.mark.parametrize('grouping', GROUPINGS)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_writing_through_the_view_undoes_grouping(size, grouping):
    x = torch.randn(2, *size, 3)
    out = torch.full_like(x, torch.nan)
    rows, cols = segments(*size, (4, 4), 3, grouping)
    for row, col in itertools.product(rows, cols):
        groups = group_view(x, row, col).reshape(-1, row[2] * col[2], 3)
        target = group_view(out, row, col)
        target.copy_(groups.view(target.shape))
    assert torch.equal(out, x)


@pytest.mark.parametrize('size', [64, 72, 80, 96, 128, 160, 200, 256])
def test_fit_groups_leaves_no_remainder(size):
    for stage, grouping in itertools.product(range(4), ('sda', 'region', 'grid')):
        n = size // 2 ** stage
        if n > 7:
            sizes = {len(g) for g in slow_axis_groups(n, nearest_divisor(n, 7), 1, 'sda')}
            assert len(sizes) == 1
            assert len(axis_segments(n, axis_layout(n, 7, 8, grouping, True))) == 1


def test_nearest_divisor():
    assert [nearest_divisor(n, 7) for n in (56, 64, 80, 13, 11, 26, 12)] == [7, 8, 8, 13, 11, 13, 6]
    assert nearest_divisor(34, 7) == 7  # 17 is beyond 2 G, 2 below G / 2
    assert axis_layout(34, 7, 8, 'region', True) == axis_layout(34, 7, 8, 'region', False)
