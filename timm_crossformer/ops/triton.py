"""Grouped attention on CUDA: Triton kernels that read and write tokens where they lie in the map.

Nothing is gathered, padded or expanded in memory. A program finds the tokens of its group by arithmetic, looks the
bias of every pair of them up in the table of offsets, and writes results to where the queries came from.

Order of tokens. A group has size_h * size_w members, counted row by row; along an axis, member m of the group (region,
phase) is token region * size * interval + m * interval + phase. Members beyond the map do not exist: they are masked
as keys and never written. The bias of a pair depends on the difference of its two members alone. So each member has a
place: its number if rows of a group were as wide as rows of the table. The entry of a pair in the table is the place of
the query minus the place of the key, counted from the entry in the centre, that of no offset.

Groups of up to 64 members are attended to at once, of 32 in the backward pass in fp32, of fewer with wide heads. Larger
ones are cut into tiles, and programs walk over tiles of keys (or queries) like flash attention, with a running maximum.
The forward pass saves nothing: the backward pass computes the probabilities anew.
"""
from __future__ import annotations

import warnings
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no kernel is launched then, see `is_installed`
    triton = None  # type: ignore[assignment]

Layout = Tuple[int, int, int]  # regions, size, interval
Attention = Callable[[Tensor, Tensor, int, Layout, Layout], Tensor]

_LARGEST_TILE = 64  # members of a group
_LARGEST_HEAD_DIM = 128
_OFFSETS_TILE = 16  # few, so that even the table of a small group keeps more than one multiprocessor busy
_LARGEST_TABLE_DIM = 64  # in fp32, two layers of the MLP twice as wide no longer fit into registers
# Left alone, the assembler may spill a few registers so that more programs run at once.
_COMPILER = {'enable_fp_fusion': True, 'maxnreg': 255}
_VARYING = (  # with the image: no kernel gains from being compiled anew because one of them is 1 or a multiple of 16
    'heads', 'height', 'width', 'size_h', 'size_w', 'interval_h', 'interval_w', 'groups_h', 'groups_w', 'groups',
    'tiles', 'table_stride', 'table_width', 'centre', 'count', 'dim',
)


def _jit(function: Callable[..., Any]) -> Any:
    """Compile at the first launch; without Triton leave the function alone."""
    if triton is None:
        return function
    names = function.__code__.co_varnames[:function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in _VARYING if name in names])


@_jit
def _enter(group, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w):
    """Enter a group of the batch: its first token, and how many of its rows and columns exist."""
    group_w = group % groups_w
    group_h = group // groups_w % groups_h
    image = group // groups_w // groups_h
    row = group_h // interval_h * size_h * interval_h + group_h % interval_h
    col = group_w // interval_w * size_w * interval_w + group_w % interval_w
    first = (image.to(tl.int64) * height + row) * width + col  # a batch may hold more numbers than 32 bits count
    real_h = tl.minimum((height - row + interval_h - 1) // interval_h, size_h)  # a tile may be longer than a group
    real_w = (width - col + interval_w - 1) // interval_w  # may count the next region too: no member is that far right
    return first, real_h, real_w


@_jit
def _find(member, group, shape):
    """Find members of a group: their tokens, whether these exist, and their places in the table."""
    first, real_h, real_w = group
    width, size_h, size_w, interval_h, interval_w, table_width = shape
    row = member // size_w
    col = member % size_w
    token = first + row * (interval_h * width) + col * interval_w
    place = tl.minimum(row, size_h - 1) * table_width + col  # some entry of the table past the end
    return token, (row < real_h) & (col < real_w), place


@_jit
def _load(pointer, token, exists, stride, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Load one head of some tokens, [tokens, BLOCK_DIM]; 0 where nothing exists."""
    dim = tl.arange(0, BLOCK_DIM)
    mask = exists[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(pointer + token[:, None] * stride + dim[None, :], mask=mask, other=0.)


@_jit
def _store(pointer, token, exists, stride, value, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    dim = tl.arange(0, BLOCK_DIM)
    mask = exists[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(pointer + token[:, None] * stride + dim[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@_jit
def _scores(q, k, table, entry, key_exists, scale, PRECISION: tl.constexpr):
    """Score all pairs, [queries, keys]. Keys that do not exist get a number too low to count, but finite.

    Infinity would turn groups without a single token, and tiles without a single key, into NaN.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + tl.load(table + entry).to(tl.float32)
    return tl.where(key_exists[None, :], scores, -1e30)


# Heads are the fastest axis of every grid: those of one token are neighbours in memory.


@_jit
def _forward_kernel(
        qkv, table, out, logsumexp,
        heads, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        table_stride, table_width, centre, tiles, scale,
        HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
        ONE_TILE: tl.constexpr,
):
    """Attend from one tile of queries to all keys of their group."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % tiles
    group = _enter(
        tl.program_id(0) // heads // tiles,
        height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w)
    shape = width, size_h, size_w, interval_h, interval_w, table_width
    channels = heads * HEAD_DIM
    qkv += head * HEAD_DIM
    table += head * table_stride + centre

    query_token, query_exists, query_place = _find(tile * BLOCK + tl.arange(0, BLOCK), group, shape)
    q = _load(qkv, query_token, query_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
    highest = tl.full([BLOCK], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    for start in range(0, BLOCK if ONE_TILE else size_h * size_w, BLOCK):
        key_token, key_exists, key_place = _find(start + tl.arange(0, BLOCK), group, shape)
        k = _load(qkv + channels, key_token, key_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        v = _load(qkv + 2 * channels, key_token, key_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        entry = query_place[:, None] - key_place[None, :]
        scores = _scores(q, k, table, entry, key_exists, scale, PRECISION)
        higher = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp(scores - higher[:, None])
        shrink = tl.exp(highest - higher)  # what was summed up so far was relative to a lower maximum
        total = total * shrink + tl.sum(p, 1)
        result = result * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        highest = higher
    _store(out + head * HEAD_DIM, query_token, query_exists, channels, result / total[:, None], HEAD_DIM, BLOCK_DIM)
    if logsumexp is not None:
        tl.store(logsumexp + query_token * heads + head, highest + tl.log(total), mask=query_exists)


@_jit
def _backward_kernel(
        grad, qkv, table, grad_qkv, grad_table,
        heads, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        table_stride, table_width, centre, groups, scale,
        HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Differentiate groups of one tile.

    A program takes many groups, all with one head. Thus it can sum up the gradients of each pair of members before it
    adds them to the table, where all programs meet at few entries.
    """
    head = tl.program_id(0) % heads
    shape = width, size_h, size_w, interval_h, interval_w, table_width
    channels = heads * HEAD_DIM
    grad += head * HEAD_DIM
    qkv += head * HEAD_DIM
    grad_qkv += head * HEAD_DIM
    table += head * table_stride + centre
    grad_table += head * table_stride + centre

    member = tl.arange(0, BLOCK)
    grad_bias = tl.zeros([BLOCK, BLOCK], tl.float32)
    # What is the same for all groups is cheap to compute, and would take more registers than there are.
    for index in tl.range(tl.program_id(0) // heads, groups, tl.num_programs(0) // heads, disable_licm=True):
        group = _enter(index, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w)
        token, exists, place = _find(member, group, shape)
        q = _load(qkv, token, exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        k = _load(qkv + channels, token, exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        v = _load(qkv + 2 * channels, token, exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        do = _load(grad, token, exists, channels, HEAD_DIM, BLOCK_DIM)
        scores = _scores(q, k, table, place[:, None] - place[None, :], exists, scale, PRECISION)
        p = tl.exp(scores - tl.max(scores, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        # Queries that do not exist have probabilities too. But their gradient is 0, and so is what follows from it.
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        _store(grad_qkv + 2 * channels, token, exists, 3 * channels, dv, HEAD_DIM, BLOCK_DIM)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        grad_bias += ds
        ds = ds.to(q.dtype)
        dq = tl.dot(ds, k, input_precision=PRECISION) * scale
        _store(grad_qkv, token, exists, 3 * channels, dq, HEAD_DIM, BLOCK_DIM)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
        _store(grad_qkv + channels, token, exists, 3 * channels, dk, HEAD_DIM, BLOCK_DIM)
    _, inside, place = _find(member, (0, size_h, size_w), shape)
    entry = place[:, None] - place[None, :]
    tl.atomic_add(grad_table + entry, grad_bias, mask=inside[:, None] & inside[None, :], sem='relaxed')


@_jit
def _backward_queries_kernel(
        grad, qkv, table, out, logsumexp, delta, grad_qkv, grad_table,
        heads, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        table_stride, table_width, centre, tiles, scale,
        HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Differentiate with regard to one tile of queries, and to the table.

    Leaves delta for the keys: the mean of the gradients of a query's probabilities, which is grad times out.
    """
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % tiles
    group = _enter(
        tl.program_id(0) // heads // tiles,
        height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w)
    shape = width, size_h, size_w, interval_h, interval_w, table_width
    channels = heads * HEAD_DIM
    qkv += head * HEAD_DIM
    table += head * table_stride + centre
    grad_table += head * table_stride + centre

    query_token, query_exists, query_place = _find(tile * BLOCK + tl.arange(0, BLOCK), group, shape)
    q = _load(qkv, query_token, query_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
    do = _load(grad + head * HEAD_DIM, query_token, query_exists, channels, HEAD_DIM, BLOCK_DIM)
    o = _load(out + head * HEAD_DIM, query_token, query_exists, channels, HEAD_DIM, BLOCK_DIM)
    row_delta = tl.sum(o * do.to(tl.float32), 1)
    tl.store(delta + query_token * heads + head, row_delta, mask=query_exists)
    row_logsumexp = tl.load(logsumexp + query_token * heads + head, mask=query_exists, other=float('inf'))
    dq = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    for start in range(0, size_h * size_w, BLOCK):
        key_token, key_exists, key_place = _find(start + tl.arange(0, BLOCK), group, shape)
        k = _load(qkv + channels, key_token, key_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        v = _load(qkv + 2 * channels, key_token, key_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        entry = query_place[:, None] - key_place[None, :]
        p = tl.exp(_scores(q, k, table, entry, key_exists, scale, PRECISION) - row_logsumexp[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - row_delta[:, None])
        tl.atomic_add(grad_table + entry, ds, mask=query_exists[:, None] & key_exists[None, :], sem='relaxed')
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    _store(grad_qkv + head * HEAD_DIM, query_token, query_exists, 3 * channels, dq * scale, HEAD_DIM, BLOCK_DIM)


@_jit
def _backward_keys_kernel(
        grad, qkv, table, logsumexp, delta, grad_qkv,
        heads, height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w,
        table_stride, table_width, centre, tiles, scale,
        HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Differentiate with regard to one tile of keys and values."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % tiles
    group = _enter(
        tl.program_id(0) // heads // tiles,
        height, width, size_h, size_w, interval_h, interval_w, groups_h, groups_w)
    shape = width, size_h, size_w, interval_h, interval_w, table_width
    channels = heads * HEAD_DIM
    grad += head * HEAD_DIM
    qkv += head * HEAD_DIM
    grad_qkv += head * HEAD_DIM
    table += head * table_stride + centre

    key_token, key_exists, key_place = _find(tile * BLOCK + tl.arange(0, BLOCK), group, shape)
    k = _load(qkv + channels, key_token, key_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
    v = _load(qkv + 2 * channels, key_token, key_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
    dk = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    for start in range(0, size_h * size_w, BLOCK):
        query_token, query_exists, query_place = _find(start + tl.arange(0, BLOCK), group, shape)
        q = _load(qkv, query_token, query_exists, 3 * channels, HEAD_DIM, BLOCK_DIM)
        do = _load(grad, query_token, query_exists, channels, HEAD_DIM, BLOCK_DIM)
        # Relative to infinity, queries that do not exist have no probabilities.
        row_logsumexp = tl.load(logsumexp + query_token * heads + head, mask=query_exists, other=float('inf'))
        row_delta = tl.load(delta + query_token * heads + head, mask=query_exists, other=0.)
        entry = query_place[:, None] - key_place[None, :]
        p = tl.exp(_scores(q, k, table, entry, key_exists, scale, PRECISION) - row_logsumexp[:, None])
        dv += tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - row_delta[:, None])
        dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION)
    _store(grad_qkv + channels, key_token, key_exists, 3 * channels, dk * scale, HEAD_DIM, BLOCK_DIM)
    _store(grad_qkv + 2 * channels, key_token, key_exists, 3 * channels, dv, HEAD_DIM, BLOCK_DIM)


@_jit
def _load_row(pointer, index, length):
    """Load parameters as a row, [1, index], 0 past the end."""
    return tl.load(pointer + index, mask=index < length, other=0.).to(tl.float32)[None, :]


@_jit
def _norm_and_project(x, gain, shift, weight, bias, eps, dim, outputs, BLOCK_OUTPUTS: tl.constexpr):
    """Apply LayerNorm, ReLU and Linear to x, [offsets, channels]. Channels from dim on are 0 and stay 0."""
    channel = tl.arange(0, x.shape[1])
    output = tl.arange(0, BLOCK_OUTPUTS)
    x = tl.where((channel < dim)[None, :], x - (tl.sum(x, 1) / dim)[:, None], 0.)
    x *= tl.rsqrt(tl.sum(x * x, 1) / dim + eps)[:, None]
    x = x * _load_row(gain, channel, dim) + _load_row(shift, channel, dim)
    mask = (channel < dim)[:, None] & (output < outputs)[None, :]
    w = tl.load(weight + output[None, :] * dim + channel[:, None], mask=mask, other=0.).to(tl.float32)
    return tl.dot(tl.maximum(x, 0.), w, input_precision='ieee') + _load_row(bias, output, outputs)


@_jit
def _table_kernel(
        offsets, table, weight0, bias0, gain1, shift1, weight1, bias1, gain2, shift2, weight2, bias2,
        gain3, shift3, weight3, bias3, eps1, eps2, eps3, count, dim, heads,
        BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):
    """Run all layers of the MLP for one tile of offsets."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(offsets + 2 * offset, mask=offset < count, other=0).to(tl.float32)[:, None]
    dx = tl.load(offsets + 2 * offset + 1, mask=offset < count, other=0).to(tl.float32)[:, None]
    channel = tl.arange(0, BLOCK_DIM)
    x = dy * _load_row(weight0, 2 * channel, 2 * dim) + dx * _load_row(weight0 + 1, 2 * channel, 2 * dim)
    x += _load_row(bias0, channel, dim)
    x = _norm_and_project(x, gain1, shift1, weight1, bias1, eps1, dim, dim, BLOCK_DIM)
    x = _norm_and_project(x, gain2, shift2, weight2, bias2, eps2, dim, dim, BLOCK_DIM)
    x = _norm_and_project(x, gain3, shift3, weight3, bias3, eps3, dim, heads, BLOCK_HEADS)
    head = tl.arange(0, BLOCK_HEADS)
    mask = (offset < count)[:, None] & (head < heads)[None, :]
    tl.store(table + head[None, :] * count + offset[:, None], x.to(table.dtype.element_ty), mask=mask)


def variant(dtype: torch.dtype, head_dim: int, members: int, backward: bool) -> Dict[str, Any]:
    """Choose what kernels are compiled for: the tile of groups of so many members, and the form of products.

    Without tensor cores, products in fp32 take registers by the dozen. A smaller tile leaves enough.
    """
    block_dim = max(16, triton.next_power_of_2(head_dim))
    largest = _LARGEST_TILE // 2 if backward and dtype == torch.float32 else _LARGEST_TILE
    largest = max(16, min(largest, largest * 128 // (block_dim * dtype.itemsize)))  # shared memory holds no more
    return {
        'HEAD_DIM': head_dim,
        'BLOCK_DIM': block_dim,
        'BLOCK': min(largest, max(16, triton.next_power_of_2(members))),
        'PRECISION': 'tf32' if dtype == torch.float32 and _allows_tf32() else 'ieee',
    }


def table_variant(dim: int, heads: int) -> Dict[str, Any]:
    """Choose what the kernel of the table is compiled for."""
    block_dim, block_heads = (max(16, triton.next_power_of_2(n)) for n in (dim, heads))
    return {'BLOCK': _OFFSETS_TILE, 'BLOCK_DIM': block_dim, 'BLOCK_HEADS': block_heads}


def launch_options(dtype: torch.dtype, block: int, backward: bool) -> Dict[str, Any]:
    """Choose warps that can hold a tile in their registers, and whether the next tile is fetched ahead."""
    light = not backward and dtype != torch.float32
    return {'num_warps': block // (16 if light else 8), 'num_stages': 2 if light else 1, **_COMPILER}


def table_launch_options() -> Dict[str, Any]:
    """Choose warps for the kernel of the table."""
    return {'num_warps': 4, **_COMPILER}


def _allows_tf32() -> bool:
    """Return whether PyTorch may round the fp32 factors of matrix products."""
    return torch.backends.cuda.matmul.fp32_precision == 'tf32'


def _launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, **options)


def _axis(n: int, layout: Layout) -> Tuple[int, int, int]:
    """Return size, interval and groups of one axis, without members and regions that have no token."""
    _, size, interval = layout
    interval = min(interval, n)
    size = min(size, -(-n // interval))
    return size, interval, -(-n // (size * interval)) * interval


def _sizes(qkv: Tensor, table: Tensor, num_heads: int, rows: Layout, cols: Layout) -> Tuple[List[int], int, int]:
    """Return the sizes that all kernels take, the groups of the batch, and the most members that a group has."""
    B, H, W = qkv.shape[:3]
    size_h, interval_h, groups_h = _axis(H, rows)
    size_w, interval_w, groups_w = _axis(W, cols)
    table_height, table_width = table.shape[1:]
    table_stride = 0 if table.shape[0] == 1 else table_height * table_width
    centre = table_height // 2 * table_width + table_width // 2
    sizes = [num_heads, H, W, size_h, size_w, interval_h, interval_w, groups_h, groups_w]
    return [*sizes, table_stride, table_width, centre], B * groups_h * groups_w, size_h * size_w


def _attend(
        qkv: Tensor,
        table: Tensor,
        num_heads: int,
        rows: Layout,
        cols: Layout,
        out: Tensor,
        logsumexp: Optional[Tensor] = None,
) -> None:
    """Write what `forward` returns into `out`, and the logarithms of the sums of exponentials."""
    sizes, groups, members = _sizes(qkv, table, num_heads, rows, cols)
    constants = variant(qkv.dtype, out.shape[3] // num_heads, members, backward=False)
    tiles = triton.cdiv(members, constants['BLOCK'])
    _launch(
        _forward_kernel, groups * tiles * num_heads,
        qkv, table, out, logsumexp, *sizes, tiles, constants['HEAD_DIM'] ** -0.5,
        **constants, ONE_TILE=tiles == 1, **launch_options(qkv.dtype, constants['BLOCK'], backward=False))


def forward(qkv: Tensor, table: Tensor, num_heads: int, rows: Layout, cols: Layout) -> Tensor:
    """Attend inside groups.

    Args:
        qkv: Queries, keys and values of all tokens, [B, H, W, 3 * C], each head by head.
        table: Biases by offset, [num_heads or 1, 2 * TH - 1, 2 * TW - 1], for groups of at most TH x TW tokens.
        num_heads: Heads.
        rows: Layout of the rows: regions, size, interval.
        cols: Layout of the columns.

    Returns:
        Tokens [B, H, W, C].
    """
    qkv, table = qkv.contiguous(), table.contiguous()
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    if out.numel() > 0:
        _attend(qkv, table, num_heads, rows, cols, out)
    return out


def backward(
        grad: Tensor,
        qkv: Tensor,
        table: Tensor,
        num_heads: int,
        rows: Layout,
        cols: Layout,
) -> Tuple[Tensor, Tensor]:
    """Differentiate `forward`.

    Programs add to the gradient of the table in any order, so its last bits may differ from run to run.

    Args:
        grad: Gradient of the result, [B, H, W, C].
        (others): See `forward`.

    Returns:
        Gradients of `qkv` and of `table`.
    """
    grad, qkv, table = grad.contiguous(), qkv.contiguous(), table.contiguous()
    grad_qkv, grad_table = torch.empty_like(qkv), torch.zeros_like(table, dtype=torch.float32)
    if grad.numel() == 0:
        return grad_qkv, grad_table.to(table.dtype)
    sizes, groups, members = _sizes(qkv, table, num_heads, rows, cols)
    constants = variant(qkv.dtype, grad.shape[3] // num_heads, members, backward=True)
    options = {**constants, **launch_options(qkv.dtype, constants['BLOCK'], backward=True)}
    tiles, scale = triton.cdiv(members, constants['BLOCK']), constants['HEAD_DIM'] ** -0.5
    if tiles == 1:
        # As many programs as run at once, a few times over: the fewer there are, the less they add to the table.
        wanted = _multiprocessors(qkv.device) * 32 // options['num_warps']
        programs = min(groups, triton.cdiv(wanted, num_heads)) * num_heads
        _launch(
            _backward_kernel, programs, grad, qkv, table, grad_qkv, grad_table, *sizes, groups, scale, **options)
    else:
        out = torch.empty_like(grad, dtype=torch.float32)
        logsumexp, delta = grad.new_empty(2, *grad.shape[:3], num_heads, dtype=torch.float32)
        _attend(qkv, table, num_heads, rows, cols, out, logsumexp)
        _launch(
            _backward_queries_kernel, groups * tiles * num_heads,
            grad, qkv, table, out, logsumexp, delta, grad_qkv, grad_table, *sizes, tiles, scale, **options)
        _launch(
            _backward_keys_kernel, groups * tiles * num_heads,
            grad, qkv, table, logsumexp, delta, grad_qkv, *sizes, tiles, scale, **options)
    return grad_qkv, grad_table.to(table.dtype)


def _multiprocessors(device: torch.device) -> int:
    """Count multiprocessors; Triton's interpreter, on a CPU, is one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


def position_table(offsets: Tensor, parameters: Sequence[Tensor], eps: Sequence[float]) -> Tensor:
    """Compute the table of biases of a `DynamicPosBias`, in fp32 whatever its parameters are.

    Args:
        offsets: What the MLP sees of each offset, [2 * height - 1, 2 * width - 1, 2].
        parameters: Parameters of the MLP in the order of its layers: Linear, three times LayerNorm and Linear.
        eps: The eps of its norms.

    Returns:
        Table [heads, 2 * height - 1, 2 * width - 1] in the dtype of the parameters.
    """
    offsets, parameters = offsets.contiguous(), [p.contiguous() for p in parameters]
    heads, dim = parameters[-2].shape
    table = parameters[0].new_empty(heads, *offsets.shape[:2])
    count = offsets.shape[0] * offsets.shape[1]
    if count > 0:
        _launch(
            _table_kernel, triton.cdiv(count, _OFFSETS_TILE),
            offsets, table, *parameters, *eps, count, dim, heads,
            **table_variant(dim, heads), **table_launch_options())
    return table


def is_installed() -> bool:
    """Return whether Triton could be imported."""
    return triton is not None


def is_interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on a CPU (TRITON_INTERPRET=1 before Triton's import)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def supports(dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether `forward` and `backward` are made for such queries, keys and values."""
    return dtype in (torch.float32, torch.float16, torch.bfloat16) and 0 < head_dim <= _LARGEST_HEAD_DIM


def supports_table(dim: int, heads: int) -> bool:
    """Return whether `position_table` can hold an MLP of this width and so many outputs in registers."""
    return 0 < dim <= _LARGEST_TABLE_DIM and 0 < heads <= _LARGEST_TABLE_DIM


_verdicts: Dict[torch.device, bool] = {}


def works_on(device: torch.device) -> bool:
    """Return whether the kernels compute what they should on a device; tried at the first question, with one warning.

    Args:
        device: Any device; the answer is True for CUDA only, and for the interpreter.
    """
    if is_interpreted():
        return True
    if not is_installed() or device.type != 'cuda' or not torch.cuda.is_available():
        return False
    if device.index is None:
        device = torch.device('cuda', torch.cuda.current_device())
    if device not in _verdicts:
        if torch.cuda.is_current_stream_capturing():  # nothing can be compared now
            return False
        fault = find_fault(device)
        _verdicts[device] = fault is None
        if fault is not None:
            text = f'The Triton kernels of grouped attention do not work on {device}, PyTorch serves instead: {fault}'
            warnings.warn(text, stacklevel=2)
    return _verdicts[device]


def find_fault(device: torch.device, reference: Optional[Attention] = None) -> Optional[str]:
    """Compare values and gradients of two small cases, with one tile and with several; say what is wrong with them."""
    try:
        attention = _reference() if reference is None else reference
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for dtype, rows in [(torch.float32, (1, 4, 2)), (torch.float16, (1, 9, 1))]:
                waves = torch.arange(72 * 96, dtype=torch.float32, device=device).sin()  # no random state is touched
                qkv = waves.view(1, 8, 9, 96).to(dtype, copy=True).requires_grad_()
                table = waves[:2 * 17 * 17].view(2, 17, 17).clone().requires_grad_()
                grad = waves[:72 * 32].view(1, 8, 9, 32).to(dtype)
                given = 2, rows, (1, 9, 1)
                result = attention(qkv, table, *given)
                wanted = result, *torch.autograd.grad(result, [qkv, table], grad)
                with torch.no_grad():
                    got = forward(qkv, table, *given), *backward(grad, qkv, table, *given)
                    for name, ours, theirs in zip(['result', 'grad_qkv', 'grad_table'], got, wanted, strict=True):
                        error = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
                        if not error < 0.02:  # neither rounding to fp16 or TF32 comes near it; NaN is caught
                            return f'{name} in {dtype} is off by {error:.1g} of its largest value'
    except Exception as error:  # no compiler, a device too old or too new: it is all the same to the caller
        return f'{type(error).__name__}: {error}'
    return None


def _reference() -> Attention:
    from .reference import grouped_attention
    return grouped_attention
