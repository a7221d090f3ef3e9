"""Triton kernels of grouped attention: they read and write tokens where they lie in the map.

Nothing is gathered, padded or expanded in memory. A program finds the tokens of its groups by arithmetic, looks the
bias of every pair of members up in the table of offsets, and writes results to where the queries came from.

Order of tokens. A group has size_h * size_w members, counted row by row; along an axis, member m of the group (region,
phase) is token region * size * interval + m * interval + phase. Groups are counted likewise: phases of a region of
columns, regions of columns, then rows, then images; groups without a single token are left out. Members beyond the map
do not exist: they are masked as keys and never written. The bias of a pair depends on the difference of its two members
alone. So each member has a place: its number if rows of a group were as wide as rows of the table. The entry of a pair
in the table is the place of the query minus the place of the key, counted from the entry in the centre, that of no
offset.

Where all keys of a group fit into a tile, a program goes through many groups with the same tile of queries of the same
head: the biases of its pairs stay in registers. Larger groups are
walked through tile by tile like flash attention, with a running maximum.

No two programs ever add to the same number, so every result is the same bits in every run. The gradients of pairs are
summed up over groups in registers, written once, and folded into the table by a kernel of their own.
"""
from __future__ import annotations

import inspect
import sys
from typing import Any, Callable

try:
    import triton
    import triton.language as tl

    inspect.getsource(sys.modules[__name__])  # Triton compiles text, which a frozen application does not hold
except (ImportError, OSError):  # no kernel is launched then
    triton = None  # type: ignore[assignment]


def divider_of(number: int) -> int:
    """Return what turns the division of any n in [0, 2^31) by a number into a product and a shift, exactly.

    With l = ceil(log2(number)), the quotient is n * factor >> (31 + l), where factor = 2^(31 + l) // number + 1 is
    less than 2^32. The result is factor + 2^32 * (l + 1), of more than 32 bits for every number.
    """
    shift = (number - 1).bit_length()
    return (shift + 1 << 32) + (1 << (31 + shift)) // number + 1


_VARYING = (  # with the image: no kernel gains from being compiled anew because one of them is 1 or a multiple of 16
    'heads', 'height', 'width', 'size_h', 'size_w', 'interval_h', 'interval_w', 'groups_h', 'groups_w',
    'by_size_w', 'by_interval_h', 'by_interval_w', 'by_groups_h', 'by_groups_w',
    'groups', 'share', 'tiles', 'first_head', 'some', 'table_heads', 'table_height', 'table_width', 'padded',
)


INTERPRETED = triton is not None and hasattr(triton, 'knobs') and bool(triton.knobs.runtime.interpret)


def _jit(function: Callable[..., Any]) -> Any:
    """Compile at the first launch; without Triton leave the function alone."""
    if triton is None:
        return function
    names = function.__code__.co_varnames[:function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in _VARYING if name in names])


# ---- where tokens lie


@_jit
def _divide(number, divider):
    """Divide whole numbers from 0 up; `divider` is what `divider_of` the other number returns."""
    number = tl.full([], 0, tl.int32) + number  # the interpreter's loops count in numbers of Python
    factor = (divider & 0xffffffff).to(tl.uint32)
    return (tl.umulhi((2 * number).to(tl.uint32), factor) >> ((divider >> 32) - 1).to(tl.uint32)).to(tl.int32)


@_jit
def _split(member, size_w, by_size_w):
    """Split numbers of members into rows and columns of the group."""
    row = _divide(member, by_size_w)
    return row, member - row * size_w


@_jit
def _locate(member, width, size_w, by_size_w, interval_h, interval_w):
    """Return tokens of members, counted from the first of their group."""
    row, col = _split(member, size_w, by_size_w)
    return (row * interval_h).to(tl.int64) * width + col * interval_w


@_jit
def _place(member, size_h, size_w, by_size_w, table_width):
    """Return places of members in the table. A tile may be longer than a group: the rest gets some place inside."""
    row, col = _split(member, size_w, by_size_w)
    return tl.minimum(row, size_h - 1) * table_width + col


@_jit
def _exist(member, real_h, real_w, size_w, by_size_w):
    """Tell which members exist in a group that has real_h rows and real_w columns."""
    row, col = _split(member, size_w, by_size_w)
    return (row < real_h) & (col < real_w)


@_jit
def _last_region(length, size, interval):
    """Return where the last, incomplete region of an axis begins, and how many members all of its groups have."""
    rest = length % (size * interval)
    return length - rest, rest // interval


@_jit
def _count(start, phase, length, size, interval, last, least):
    """Count the members of a group along an axis, given its first token there and what `_last_region` returns."""
    fewer = least + (start + least * interval < length).to(tl.int32)
    return tl.where(start - phase < last, size, fewer)


@_jit
def _enter(
        index, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        by_interval_h, by_interval_w, by_groups_h, by_groups_w, last_h, least_h, last_w, least_w,
):
    """Enter a group of the batch: its first token, and how many rows and columns of it exist."""
    row_of_groups = _divide(index, by_groups_w)
    group_w = index - row_of_groups * groups_w
    image = _divide(row_of_groups, by_groups_h)
    group_h = row_of_groups - image * groups_h
    row_phase = group_h - _divide(group_h, by_interval_h) * interval_h
    col_phase = group_w - _divide(group_w, by_interval_w) * interval_w
    row = (group_h - row_phase) * size_h + row_phase
    col = (group_w - col_phase) * size_w + col_phase
    real_h = _count(row, row_phase, height, size_h, interval_h, last_h, least_h)
    real_w = _count(col, col_phase, width, size_w, interval_w, last_w, least_w)
    return (image.to(tl.int64) * height + row) * width + col, real_h, real_w


@_jit
def _load(pointer, token, exists, stride, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Load one head of some tokens, [tokens, BLOCK_DIM]; 0 where nothing exists."""
    dim = tl.arange(0, BLOCK_DIM)
    mask = exists[:, None]
    if HEAD_DIM != BLOCK_DIM:
        mask = mask & (dim < HEAD_DIM)[None, :]
    return tl.load(pointer + (token[:, None] * stride + dim[None, :]), mask=mask, other=0.)


@_jit
def _store(pointer, token, exists, stride, value, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    dim = tl.arange(0, BLOCK_DIM)
    mask = exists[:, None]
    if HEAD_DIM != BLOCK_DIM:
        mask = mask & (dim < HEAD_DIM)[None, :]
    tl.store(pointer + (token[:, None] * stride + dim[None, :]), value.to(pointer.dtype.element_ty), mask=mask)


@_jit
def _bias(table, query_place, key_place):
    """Look the biases of all pairs up, [queries, keys], as multiples of ln 2."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    return tl.load(table + (query_place[:, None] - key_place[None, :])).to(tl.float32) * LOG2_E


@_jit
def _scores(q, k, bias, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Score all pairs, [queries, keys], as multiples of ln 2: processors have exponentials of base 2."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    return tl.dot(q, tl.trans(k), input_precision=PRECISION) * (HEAD_DIM ** -0.5 * LOG2_E) + bias


# Heads are the fastest axis of every grid: those of one token are neighbours in memory.
# What a loop needs is computed inside it, however often (`disable_licm`): kept, it would take more registers than there
# are. What is to be kept stands before the loop.

@_jit
def _table_of(table, head, table_heads, table_height, table_width):
    """Point at the entry of no offset in the table of a head."""
    return table + (head % table_heads * table_height + table_height // 2) * table_width + table_width // 2


# ---- groups of one tile


@_jit
def forward_kernel(
        qkv, table, out, logsumexp,
        heads, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        by_size_w, by_interval_h, by_interval_w, by_groups_h, by_groups_w,
        table_heads, table_height, table_width, groups, share,
        HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Attend in a share of the groups, each of one tile."""
    head = tl.program_id(0) % heads
    index = tl.program_id(0) // heads * share
    channels = heads * HEAD_DIM
    qkv += head * HEAD_DIM
    out += head * HEAD_DIM
    table = _table_of(table, head, table_heads, table_height, table_width)

    member = tl.arange(0, BLOCK)
    offset = _locate(member, width, size_w, by_size_w, interval_h, interval_w)
    place = _place(member, size_h, size_w, by_size_w, table_width)
    bias = _bias(table, place, place)
    last_h, least_h = _last_region(height, size_h, interval_h)
    last_w, least_w = _last_region(width, size_w, interval_w)
    for group in tl.range(index, tl.minimum(index + share, groups), disable_licm=True):
        token, real_h, real_w = _enter(
            group, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
            by_interval_h, by_interval_w, by_groups_h, by_groups_w, last_h, least_h, last_w, least_w)
        exists = _exist(member, real_h, real_w, size_w, by_size_w)
        here = qkv + token * (3 * channels)
        q = _load(here, offset, exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        k = _load(here + channels, offset, exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        v = _load(here + 2 * channels, offset, exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        scores = _scores(q, k, bias, PRECISION, HEAD_DIM)
        scores = tl.where(exists[None, :], scores, float('-inf'))  # one key at least exists
        highest = tl.max(scores, 1)
        p = tl.exp2(scores - highest[:, None])
        total = tl.sum(p, 1)
        result = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (1. / total)[:, None]
        _store(out + token * channels, offset, exists, channels, result, HEAD_DIM, BLOCK_DIM)
        if logsumexp is not None:
            tl.store(logsumexp + (token + offset) * heads + head, highest + tl.log2(total), mask=exists)


@_jit
def backward_kernel(
        grad, qkv, table, logsumexp, grad_qkv, pairs,
        heads, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        by_size_w, by_interval_h, by_interval_w, by_groups_h, by_groups_w,
        table_heads, table_height, table_width, groups, share,
        HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Differentiate a share of the groups, each of one tile, and sum up the gradients of pairs."""
    SCALE: tl.constexpr = HEAD_DIM ** -0.5
    head = tl.program_id(0) % heads
    index = tl.program_id(0) // heads * share
    channels = heads * HEAD_DIM
    grad += head * HEAD_DIM
    qkv += head * HEAD_DIM
    grad_qkv += head * HEAD_DIM
    table = _table_of(table, head, table_heads, table_height, table_width)

    member = tl.arange(0, BLOCK)
    offset = _locate(member, width, size_w, by_size_w, interval_h, interval_w)
    place = _place(member, size_h, size_w, by_size_w, table_width)
    bias = _bias(table, place, place)
    grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
    last_h, least_h = _last_region(height, size_h, interval_h)
    last_w, least_w = _last_region(width, size_w, interval_w)
    for group in tl.range(index, tl.minimum(index + share, groups), disable_licm=True):
        token, real_h, real_w = _enter(
            group, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
            by_interval_h, by_interval_w, by_groups_h, by_groups_w, last_h, least_h, last_w, least_w)
        exists = _exist(member, real_h, real_w, size_w, by_size_w)
        here = qkv + token * (3 * channels)
        there = grad_qkv + token * (3 * channels)
        q = _load(here, offset, exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        k = _load(here + channels, offset, exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        # Relative to infinity, queries that do not exist have no probabilities.
        row_logsumexp = tl.load(logsumexp + (token + offset) * heads + head, mask=exists, other=float('inf'))
        scores = tl.where(exists[None, :], _scores(q, k, bias, PRECISION, HEAD_DIM), float('-inf'))
        p = tl.exp2(scores - row_logsumexp[:, None])
        do = _load(grad + token * channels, offset, exists, channels, HEAD_DIM, BLOCK_DIM)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        _store(there + 2 * channels, offset, exists, 3 * channels, dv, HEAD_DIM, BLOCK_DIM)
        v = _load(here + 2 * channels, offset, exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        grad_bias += ds
        ds = ds.to(q.dtype)
        dq = tl.dot(ds, k, input_precision=PRECISION) * SCALE
        _store(there, offset, exists, 3 * channels, dq, HEAD_DIM, BLOCK_DIM)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * SCALE
        _store(there + channels, offset, exists, 3 * channels, dk, HEAD_DIM, BLOCK_DIM)
    pairs += tl.program_id(0).to(tl.int64) * (BLOCK * BLOCK)
    tl.store(pairs + (member[:, None] * BLOCK + member[None, :]), grad_bias)


# ---- groups of several tiles


@_jit
def _enter_tile(
        heads, tiles, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        by_interval_h, by_interval_w, by_groups_h, by_groups_w,
):
    """Read from the number of the program: head, tile, and of the group what `_enter` returns."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % tiles
    last_h, least_h = _last_region(height, size_h, interval_h)
    last_w, least_w = _last_region(width, size_w, interval_w)
    token, real_h, real_w = _enter(
        tl.program_id(0) // heads // tiles, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        by_interval_h, by_interval_w, by_groups_h, by_groups_w, last_h, least_h, last_w, least_w)
    return head, tile, token, real_h, real_w


@_jit
def forward_tiles_kernel(
        qkv, table, out, logsumexp,
        heads, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        by_size_w, by_interval_h, by_interval_w, by_groups_h, by_groups_w,
        table_heads, table_height, table_width, tiles,
        HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
        PRECISION: tl.constexpr,
):
    """Attend from one tile of queries to all keys of their group, some at a time."""
    head, tile, token, real_h, real_w = _enter_tile(
        heads, tiles, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        by_interval_h, by_interval_w, by_groups_h, by_groups_w)
    channels = heads * HEAD_DIM
    qkv += token * (3 * channels) + head * HEAD_DIM
    table = _table_of(table, head, table_heads, table_height, table_width)

    query = tile * BLOCK + tl.arange(0, BLOCK)
    q_offset = _locate(query, width, size_w, by_size_w, interval_h, interval_w)
    q_place = _place(query, size_h, size_w, by_size_w, table_width)
    q_exists = _exist(query, real_h, real_w, size_w, by_size_w)
    q = _load(qkv, q_offset, q_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
    highest = tl.full([BLOCK], -1e30, tl.float32)  # finite: whole tiles of keys may not exist
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    for start in tl.range(0, size_h * size_w, STEP, disable_licm=True):
        key = start + tl.arange(0, STEP)
        k_offset = _locate(key, width, size_w, by_size_w, interval_h, interval_w)
        k_place = _place(key, size_h, size_w, by_size_w, table_width)
        k_exists = _exist(key, real_h, real_w, size_w, by_size_w)
        k = _load(qkv + channels, k_offset, k_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        v = _load(qkv + 2 * channels, k_offset, k_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        scores = _scores(q, k, _bias(table, q_place, k_place), PRECISION, HEAD_DIM)
        scores = tl.where(k_exists[None, :], scores, float('-inf'))
        higher = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)  # what was summed up so far was relative to a lower maximum
        total = total * shrink + tl.sum(p, 1)
        result = result * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        highest = higher
    out += token * channels + head * HEAD_DIM
    _store(out, q_offset, q_exists, channels, result * (1. / total)[:, None], HEAD_DIM, BLOCK_DIM)
    if logsumexp is not None:
        tl.store(logsumexp + (token + q_offset) * heads + head, highest + tl.log2(total), mask=q_exists)


@_jit
def backward_queries_kernel(
        grad, qkv, table, out, logsumexp, delta, grad_qkv,
        heads, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        by_size_w, by_interval_h, by_interval_w, by_groups_h, by_groups_w,
        table_heads, table_height, table_width, tiles,
        HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
        PRECISION: tl.constexpr,
):
    """Differentiate with regard to one tile of queries.

    Leaves delta for the other kernels: the mean of the gradients of a query's probabilities, which is grad times out.
    """
    head, tile, token, real_h, real_w = _enter_tile(
        heads, tiles, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        by_interval_h, by_interval_w, by_groups_h, by_groups_w)
    channels = heads * HEAD_DIM
    qkv += token * (3 * channels) + head * HEAD_DIM
    table = _table_of(table, head, table_heads, table_height, table_width)

    query = tile * BLOCK + tl.arange(0, BLOCK)
    q_offset = _locate(query, width, size_w, by_size_w, interval_h, interval_w)
    q_place = _place(query, size_h, size_w, by_size_w, table_width)
    q_exists = _exist(query, real_h, real_w, size_w, by_size_w)
    q = _load(qkv, q_offset, q_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
    do = _load(grad + token * channels + head * HEAD_DIM, q_offset, q_exists, channels, HEAD_DIM, BLOCK_DIM)
    o = _load(out + token * channels + head * HEAD_DIM, q_offset, q_exists, channels, HEAD_DIM, BLOCK_DIM)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row = (token + q_offset) * heads + head
    tl.store(delta + row, row_delta, mask=q_exists)
    row_logsumexp = tl.load(logsumexp + row, mask=q_exists, other=float('inf'))
    dq = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    for start in tl.range(0, size_h * size_w, STEP, disable_licm=True):
        key = start + tl.arange(0, STEP)
        k_offset = _locate(key, width, size_w, by_size_w, interval_h, interval_w)
        k_place = _place(key, size_h, size_w, by_size_w, table_width)
        k_exists = _exist(key, real_h, real_w, size_w, by_size_w)
        k = _load(qkv + channels, k_offset, k_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        v = _load(qkv + 2 * channels, k_offset, k_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        scores = _scores(q, k, _bias(table, q_place, k_place), PRECISION, HEAD_DIM)
        p = tl.exp2(tl.where(k_exists[None, :], scores, float('-inf')) - row_logsumexp[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - row_delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    grad_qkv += token * (3 * channels) + head * HEAD_DIM
    _store(grad_qkv, q_offset, q_exists, 3 * channels, dq * HEAD_DIM ** -0.5, HEAD_DIM, BLOCK_DIM)


@_jit
def backward_keys_kernel(
        grad, qkv, table, logsumexp, delta, grad_qkv,
        heads, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        by_size_w, by_interval_h, by_interval_w, by_groups_h, by_groups_w,
        table_heads, table_height, table_width, tiles,
        HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
        PRECISION: tl.constexpr,
):
    """Differentiate with regard to one tile of keys and values."""
    head, tile, token, real_h, real_w = _enter_tile(
        heads, tiles, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        by_interval_h, by_interval_w, by_groups_h, by_groups_w)
    channels = heads * HEAD_DIM
    qkv += token * (3 * channels) + head * HEAD_DIM
    grad += token * channels + head * HEAD_DIM
    table = _table_of(table, head, table_heads, table_height, table_width)

    key = tile * BLOCK + tl.arange(0, BLOCK)
    k_offset = _locate(key, width, size_w, by_size_w, interval_h, interval_w)
    k_place = _place(key, size_h, size_w, by_size_w, table_width)
    k_exists = _exist(key, real_h, real_w, size_w, by_size_w)
    k = _load(qkv + channels, k_offset, k_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
    v = _load(qkv + 2 * channels, k_offset, k_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
    dk = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    for start in tl.range(0, size_h * size_w, STEP, disable_licm=True):
        query = start + tl.arange(0, STEP)
        q_offset = _locate(query, width, size_w, by_size_w, interval_h, interval_w)
        q_place = _place(query, size_h, size_w, by_size_w, table_width)
        q_exists = _exist(query, real_h, real_w, size_w, by_size_w)
        q = _load(qkv, q_offset, q_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        do = _load(grad, q_offset, q_exists, channels, HEAD_DIM, BLOCK_DIM)
        row = (token + q_offset) * heads + head
        # Relative to infinity, queries that do not exist have no probabilities.
        row_logsumexp = tl.load(logsumexp + row, mask=q_exists, other=float('inf'))
        row_delta = tl.load(delta + row, mask=q_exists, other=0.)
        scores = _scores(q, k, _bias(table, q_place, k_place), PRECISION, HEAD_DIM)
        p = tl.exp2(tl.where(k_exists[None, :], scores, float('-inf')) - row_logsumexp[:, None])
        dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - row_delta[:, None])
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    grad_qkv += token * (3 * channels) + head * HEAD_DIM
    _store(grad_qkv + channels, k_offset, k_exists, 3 * channels, dk * HEAD_DIM ** -0.5, HEAD_DIM, BLOCK_DIM)
    _store(grad_qkv + 2 * channels, k_offset, k_exists, 3 * channels, dv, HEAD_DIM, BLOCK_DIM)


@_jit
def backward_pairs_kernel(
        grad, qkv, table, logsumexp, delta, pairs,
        heads, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        by_size_w, by_interval_h, by_interval_w, by_groups_h, by_groups_w,
        table_heads, table_height, table_width, groups, tiles, share, first_head, some,
        HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Sum the gradients of the pairs of one tile of queries and one of keys up over a share of the groups.

    For some of the heads, from first_head on.
    """
    place = tl.program_id(0) % some
    q_tile = tl.program_id(0) // some % tiles
    k_tile = tl.program_id(0) // some // tiles % tiles
    part = tl.program_id(0) // some // tiles // tiles
    head = first_head + place
    index = part * share
    channels = heads * HEAD_DIM
    grad += head * HEAD_DIM
    qkv += head * HEAD_DIM
    table = _table_of(table, head, table_heads, table_height, table_width)

    query = q_tile * BLOCK + tl.arange(0, BLOCK)
    key = k_tile * BLOCK + tl.arange(0, BLOCK)
    q_offset = _locate(query, width, size_w, by_size_w, interval_h, interval_w)
    k_offset = _locate(key, width, size_w, by_size_w, interval_h, interval_w)
    q_place = _place(query, size_h, size_w, by_size_w, table_width)
    k_place = _place(key, size_h, size_w, by_size_w, table_width)
    bias = _bias(table, q_place, k_place)
    grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
    last_h, least_h = _last_region(height, size_h, interval_h)
    last_w, least_w = _last_region(width, size_w, interval_w)
    for group in tl.range(index, tl.minimum(index + share, groups), disable_licm=True):
        token, real_h, real_w = _enter(
            group, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
            by_interval_h, by_interval_w, by_groups_h, by_groups_w, last_h, least_h, last_w, least_w)
        q_exists = _exist(query, real_h, real_w, size_w, by_size_w)
        k_exists = _exist(key, real_h, real_w, size_w, by_size_w)
        here = qkv + token * (3 * channels)
        q = _load(here, q_offset, q_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        k = _load(here + channels, k_offset, k_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        v = _load(here + 2 * channels, k_offset, k_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        do = _load(grad + token * channels, q_offset, q_exists, channels, HEAD_DIM, BLOCK_DIM)
        rows = (token + q_offset) * heads + head
        row_logsumexp = tl.load(logsumexp + rows, mask=q_exists, other=float('inf'))
        row_delta = tl.load(delta + rows, mask=q_exists, other=0.)
        scores = tl.where(k_exists[None, :], _scores(q, k, bias, PRECISION, HEAD_DIM), float('-inf'))
        p = tl.exp2(scores - row_logsumexp[:, None])
        grad_bias += p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - row_delta[:, None])
    padded = tiles * BLOCK
    pairs += (part * some + place).to(tl.int64) * padded * padded
    tl.store(pairs + (query.to(tl.int64)[:, None] * padded + key[None, :]), grad_bias)


# ---- the table


@_jit
def fold_kernel(
        pairs, grad_table, size_h, size_w, table_height, table_width, tiles, padded,
        BLOCK: tl.constexpr, STEP: tl.constexpr,
):
    """Sum the gradients of pairs [heads, padded, padded] up by offset, for a tile of one row of the table."""
    tile = tl.program_id(0) % tiles
    table_row = tl.program_id(0) // tiles % table_height
    head = tl.program_id(0) // tiles // table_height
    dy = table_row - table_height // 2
    entry = tile * BLOCK + tl.arange(0, BLOCK)
    dx = entry - table_width // 2
    pairs += head.to(tl.int64) * padded * padded
    total = tl.zeros([STEP, BLOCK], tl.float32)
    for row in range(tl.maximum(dy, 0), tl.minimum(size_h + dy, size_h)):
        for start in range(0, size_w, STEP):
            col = start + tl.arange(0, STEP)
            key_col = col[:, None] - dx[None, :]
            query = (row * size_w + col).to(tl.int64)
            mask = (col < size_w)[:, None] & (key_col >= 0) & (key_col < size_w)
            total += tl.load(
                pairs + (query[:, None] * padded + ((row - dy) * size_w + key_col)), mask=mask, other=0.)
    grad_table += (head.to(tl.int64) * table_height + table_row) * table_width
    tl.store(grad_table + entry, tl.sum(total, 0).to(grad_table.dtype.element_ty), mask=entry < table_width)
