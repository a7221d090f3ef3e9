"""Grouped attention on CUDA by the kernels of `kernels.py`: whether they serve, how they are launched."""
import functools
import warnings
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from . import cpu, kernels, reference
from .grouping import Layout

Attention = Callable[[Tensor, Tensor, int, Layout, Layout], Tensor]

_OLDEST_TRITON = (3, 5)  # torch 2.9
_OLDEST_CAPABILITY = (8, 0)  # older cards have no tensor cores for these kernels: PyTorch's products are faster there
_DEVICE_TYPE = 'cuda'
_LARGEST_TILE = 64  # members of a group
_LARGEST_HEAD_DIM = 128
_REGISTERS = 65536  # of a multiprocessor
_PAIRS = 1 << 24  # whose gradients are kept in memory at a time where groups are large: 64 MiB


class Variant(NamedTuple):
    """What a pass over groups of some size is compiled for."""

    constants: Tuple[Tuple[str, Any], ...]
    options: Tuple[Tuple[str, Any], ...]
    block: int  # queries, in the kernel for keys keys, of a tile
    step: int  # what meets them at a time; both sides of the tiles of pairs
    one_tile: bool
    resident: int  # programs that run on a multiprocessor at once


@functools.lru_cache(1024)
def variant(dtype: torch.dtype, head_dim: int, members: int, backward: bool, tf32: bool, hip: bool = False) -> Variant:
    """Choose tiles and warps for groups of so many members.

    Args:
        dtype: Of queries, keys and values.
        head_dim: Channels per head.
        members: The most that a group has.
        backward: Whether the backward pass is meant.
        tf32: Whether the factors of products in fp32 may be rounded.
        hip: Whether the target is one of AMD's.
    """
    block_dim = max(16, _power_of_2(head_dim))
    # Shared memory holds no more; nor do registers, where products in fp32 take them by the dozen.
    largest = max(16, min(_LARGEST_TILE, _LARGEST_TILE * 128 // (block_dim * dtype.itemsize)))
    one_tile = members <= largest
    block = step = min(largest, max(16, _power_of_2(members)))
    if not one_tile:
        if backward and dtype == torch.float32:
            block = step = min(block, 32)
        if step == 64 and -(-members // 32) * 32 < 0.9 * (-(-members // 64) * 64):  # 14 x 14: much of it would be idle
            step = 32
    light = dtype != torch.float32 and block_dim <= 32
    warps = max(1, block * step // 1024) * (1 if light else 4 if block_dim * dtype.itemsize > 128 else 2)
    # A pass that waits for memory gains from a third program at work.
    resident_warps = 12 if light and one_tile and not backward else 8
    options = {'num_warps': warps, 'num_stages': 1, 'enable_fp_fusion': True}
    if not hip:
        # Left alone, the assembler may spill a few registers so that more programs run at once.
        options['maxnreg'] = min(255, _REGISTERS // (32 * max(resident_warps, warps)) // 8 * 8)
    constants = {
        'HEAD_DIM': head_dim,
        'BLOCK_DIM': block_dim,
        'BLOCK': block,
        'PRECISION': 'tf32' if dtype == torch.float32 and tf32 and not hip else 'ieee',
    }
    if not one_tile:
        constants['STEP'] = step
    return Variant(
        tuple(constants.items()), tuple(options.items()), block, step, one_tile, max(1, resident_warps // warps))


def pairs_options(variant: Variant) -> Dict[str, Any]:
    """Return constants and options of the kernel for pairs, whose tiles are square."""
    options = dict((*variant.constants, *variant.options))
    del options['STEP']
    wide = options['num_warps'] * 256 >= variant.block * variant.step  # what `variant` gives to rows of 256 bytes
    return {**options, 'BLOCK': variant.step, 'num_warps': options['num_warps'] * (2 if wide else 1)}


def _power_of_2(number: int) -> int:
    """Return the next power of 2 from a number up."""
    return 1 << (number - 1).bit_length()


def _allows_tf32() -> bool:
    """Return whether PyTorch may round the fp32 factors of matrix products."""
    return torch.backends.cuda.matmul.fp32_precision == 'tf32'


class Plan(NamedTuple):
    """How one pass over one shape is launched."""

    variant: Variant
    options: Dict[str, Any]  # constants and options of `variant`
    sizes: List[int]  # what all kernels take
    groups: int
    tiles: int
    steps: int
    share: int  # groups that a program goes through where it keeps the biases of pairs
    parts: int  # programs per head, and pair of tiles, then


@functools.lru_cache(4096)
def _plan(
        shape: torch.Size,
        table_shape: torch.Size,
        num_heads: int,
        rows: Layout,
        cols: Layout,
        dtype: torch.dtype,
        backward: bool,
        tf32: bool,
        processors: int,
) -> Plan:
    """Plan a pass over tokens of this shape, [B, H, W, 3 * C]."""
    B, H, W, channels = shape
    size_h, interval_h, groups_h = _axis(H, rows)
    size_w, interval_w, groups_w = _axis(W, cols)
    members, groups = size_h * size_w, B * groups_h * groups_w
    chosen = variant(dtype, channels // (3 * num_heads), members, backward, tf32, torch.version.hip is not None)
    tiles, steps = -(-members // chosen.block), -(-members // chosen.step)
    sizes = [num_heads, H, W, size_h, size_w, interval_h, interval_w, groups_h, groups_w]
    sizes += map(kernels.divider_of, (size_w, interval_h, interval_w, groups_h, groups_w))
    sizes += table_shape
    # As many programs as run at once, and no more than make the longest of them shorter.
    share = -(-groups // max(1, processors * chosen.resident // (num_heads * steps ** 2)))
    options = dict((*chosen.constants, *chosen.options))
    return Plan(chosen, options, sizes, groups, tiles, steps, share, -(-groups // share))


def _axis(n: int, layout: Layout) -> Tuple[int, int, int]:
    """Return size, interval and groups of one axis, without members and groups that have no token."""
    _, size, interval = layout
    interval = min(interval, n)
    size = min(size, -(-n // interval))
    region = size * interval
    return size, interval, n // region * interval + min(n % region, interval)


@functools.lru_cache(64)
def _processors(device: torch.device) -> int:
    """Count multiprocessors; Triton's interpreter, on a CPU, is one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


def _launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, **options)


def forward(
        qkv: Tensor,
        table: Tensor,
        num_heads: int,
        rows: Layout,
        cols: Layout,
        save: bool = False,
        processors: Optional[int] = None,
) -> Tuple[Tensor, Tensor]:
    """Attend inside groups.

    Args:
        qkv: Queries, keys and values of all tokens, [B, H, W, 3 * C], each head by head.
        table: Biases by offset, [num_heads or 1, 2 * TH - 1, 2 * TW - 1], for groups of at most TH x TW tokens.
        num_heads: Heads.
        rows: Layout of the rows: regions, size, interval.
        cols: Layout of the columns.
        save: Whether `backward` will follow.
        processors: Multiprocessors to share the work among, those of the device if None.

    Returns:
        Tokens [B, H, W, C]. If `save`, logarithms to base 2 of the sums of exponentials of scores, [B, H, W, num_heads]
        in fp32, else a tensor without numbers.
    """
    qkv, table = qkv.contiguous(), table.contiguous()
    B, H, W, channels = qkv.shape
    out = qkv.new_empty(B, H, W, channels // 3)
    logsumexp = qkv.new_empty((B, H, W, num_heads) if save else (0,), dtype=torch.float32)
    if out.numel() == 0:
        return out, logsumexp
    plan = _plan(
        qkv.shape, table.shape, num_heads, rows, cols, qkv.dtype, False, _allows_tf32(),
        processors or _processors(qkv.device))
    tensors = qkv, table, out, logsumexp if save else None
    if plan.variant.one_tile:
        _launch(
            kernels.forward_kernel, plan.parts * num_heads, *tensors, *plan.sizes, plan.groups, plan.share,
            **plan.options)
    else:
        _launch(
            kernels.forward_tiles_kernel, plan.groups * plan.tiles * num_heads, *tensors, *plan.sizes, plan.tiles,
            **plan.options)
    return out, logsumexp


def backward(
        grad: Tensor,
        qkv: Tensor,
        table: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        num_heads: int,
        rows: Layout,
        cols: Layout,
        processors: Optional[int] = None,
) -> Tuple[Tensor, Tensor]:
    """Differentiate `forward`; the same bits in every run.

    Args:
        grad: Gradient of the result, [B, H, W, C].
        out: What `forward` returned.
        logsumexp: What `forward` returned beside it.
        (others): See `forward`.

    Returns:
        Gradients of `qkv` and of `table`.
    """
    grad, qkv, table = grad.contiguous(), qkv.contiguous(), table.contiguous()
    grad_qkv = torch.empty_like(qkv)
    if grad.numel() == 0:
        return grad_qkv, torch.zeros_like(table)
    plan = _plan(
        qkv.shape, table.shape, num_heads, rows, cols, qkv.dtype, True, _allows_tf32(),
        processors or _processors(qkv.device))
    if plan.variant.one_tile:
        pairs = grad.new_empty(plan.parts, num_heads, plan.variant.block, plan.variant.block, dtype=torch.float32)
        _launch(
            kernels.backward_kernel, plan.parts * num_heads,
            grad, qkv, table, logsumexp, grad_qkv, pairs, *plan.sizes, plan.groups, plan.share, **plan.options)
        return grad_qkv, _fold(pairs, table, plan).to(table.dtype)
    delta = torch.empty_like(logsumexp)
    programs = plan.groups * plan.tiles * num_heads
    _launch(
        kernels.backward_queries_kernel, programs,
        grad, qkv, table, out, logsumexp, delta, grad_qkv, *plan.sizes, plan.tiles, **plan.options)
    _launch(
        kernels.backward_keys_kernel, programs,
        grad, qkv, table, logsumexp, delta, grad_qkv, *plan.sizes, plan.tiles, **plan.options)
    return grad_qkv, _grad_table(grad, qkv, table, logsumexp, delta, num_heads, plan).to(table.dtype)


def _grad_table(
        grad: Tensor, qkv: Tensor, table: Tensor, logsumexp: Tensor, delta: Tensor, num_heads: int, plan: Plan,
) -> Tensor:
    """Differentiate with regard to the table where groups are large, for a few heads at a time."""
    padded = plan.steps * plan.variant.step
    some = max(1, min(num_heads, _PAIRS // padded ** 2))
    options = pairs_options(plan.variant)
    found = []
    for first in range(0, num_heads, some):
        some = min(some, num_heads - first)
        pairs = grad.new_empty(plan.parts, some, padded, padded, dtype=torch.float32)
        _launch(
            kernels.backward_pairs_kernel, plan.parts * plan.steps ** 2 * some,
            grad, qkv, table, logsumexp, delta, pairs, *plan.sizes, plan.groups, plan.steps, plan.share, first, some,
            **options)
        found.append(_fold(pairs, table, plan))
    if len(found) == 1:
        return found[0]
    return torch.cat(found) if table.shape[0] > 1 else torch.stack(found).sum(0)


def _fold(pairs: Tensor, table: Tensor, plan: Plan) -> Tensor:
    """Sum gradients of pairs [parts, some heads, N, N] up by offset: [some heads, or 1 as in `table`, ...] in fp32."""
    shared = table.shape[0] == 1
    if shared or pairs.shape[0] > 1:
        pairs = pairs.sum((0, 1), keepdim=True)[0] if shared else pairs.sum(0)
    else:
        pairs = pairs[0]
    heads, padded = pairs.shape[:2]
    _, table_height, table_width = table.shape
    grad_table = pairs.new_empty(heads, table_height, table_width)
    block = 32 if table_width > 16 else 16
    tiles = -(-table_width // block)
    _launch(
        kernels.fold_kernel, heads * table_height * tiles,
        pairs, grad_table, *plan.sizes[3:5], table_height, table_width, tiles, padded,
        BLOCK=block, STEP=16, num_warps=4)
    return grad_table


def is_installed() -> bool:
    """Return whether Triton could be imported."""
    return kernels.triton is not None


def is_interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on a CPU (TRITON_INTERPRET=1 before Triton's import)."""
    return kernels.INTERPRETED


def supports(dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether `forward` and `backward` are made for such queries, keys and values."""
    return dtype in (torch.float32, torch.float16, torch.bfloat16) and 0 < head_dim <= _LARGEST_HEAD_DIM


# ---- whether kernels compute what they should

_verdicts: Dict[Any, bool] = {}
_told: set = set()


def works_on(qkv: Tensor, num_heads: int, rows: Layout, cols: Layout, backward: bool) -> bool:
    """Return whether the kernels of a pass compute what they should on the device of qkv.

    They are tried at the first question about a device, dtype and variant of kernels, with a warning if they do not.

    Args:
        qkv: On any device; the answer is True for CUDA only, and for the interpreter.
        (others): See `forward`.
        backward: Whether the backward pass is meant.
    """
    if is_interpreted():
        return True
    device = qkv.device
    if not is_installed() or device.type != _DEVICE_TYPE or not torch.cuda.is_available() or qkv.numel() == 0:
        return False
    head_dim = qkv.shape[3] // (3 * num_heads)
    members = _axis(qkv.shape[1], rows)[0] * _axis(qkv.shape[2], cols)[0]
    chosen = variant(qkv.dtype, head_dim, members, backward, _allows_tf32(), torch.version.hip is not None)
    key = device, qkv.dtype, chosen, backward
    verdict = _verdicts.get(key)
    if verdict is None:
        if torch.cuda.is_current_stream_capturing():  # nothing can be compared now
            _warn_once(
                'A CUDA graph is captured before grouped attention was called in this dtype and size for the first '
                'time: PyTorch serves in this graph, instead of the Triton kernels. Run the model once before.')
            return False
        fault = find_fault(device, qkv.dtype, head_dim, chosen, backward)
        verdict = _verdicts[key] = fault is None
        if fault is not None:
            _warn_once(
                f'The Triton kernels of grouped attention do not work on {device} in {qkv.dtype}, PyTorch serves '
                f'instead: {fault}')
    return verdict


def _warn_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        warnings.warn(text, stacklevel=3)


# Rows and columns of groups that between them need every variant of the kernels.
_GROUPS = [(3, 5), (5, 6), (7, 9), (3, 11), (5, 7), (9, 9), (10, 12), (14, 14)]


def find_fault(
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        wanted: Variant,
        backward_too: bool,
        attention: Attention = reference.grouped_attention,
) -> Optional[str]:
    """Compare a small case with the reference, in fp32; say what is wrong.

    Nothing of it is recorded by autograd: whoever watches tensors that are saved for a backward pass, as activation
    checkpointing does, would find these.

    Args:
        device: Where to try.
        dtype: Of queries, keys and values.
        head_dim: Channels per head.
        wanted: The variant to try.
        backward_too: Whether it is one of the backward pass.
        attention: What to compare results with.
    """
    try:
        fault = _unsuited(device)
        if fault is not None:
            return fault
        hip = torch.version.hip is not None
        height, width = next(
            (h, w) for h, w in _GROUPS
            if variant(dtype, head_dim, h * w, backward_too, _allows_tf32(), hip) == wanted)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            B, H, W, C = 2, 2 * height - 1, 2 * width - 1, 2 * head_dim  # some members of most groups do not exist
            waves = torch.arange(B * H * W * 3 * C, dtype=torch.float32, device=device).sin()  # not random: no state
            qkv = waves.view(B, H, W, 3 * C).to(dtype)
            # Like the values: the table's gradient, a sum over all groups, is large then. Of unrelated numbers it would
            # nearly cancel, and what is left be as small as the rounding of `out`.
            grad = (qkv[..., 2 * C:].float() + waves[:B * H * W * C].view(B, H, W, C).cos()).to(dtype)
            table = waves[:2 * H * W].view(2, H, W).clone()
            rows, cols = (1, height, 2), (2, width, 1)
            out, logsumexp = forward(qkv, table, 2, rows, cols, save=backward_too, processors=1)
            pairs = [('result', out, attention(qkv.float(), table, 2, rows, cols))]
            if backward_too:
                ours = backward(grad, qkv, table, out, logsumexp, 2, rows, cols, processors=1)
                theirs = cpu.backward(grad.float(), qkv.float(), table, 2, rows, cols)  # right on any device
                pairs += zip(['grad_qkv', 'grad_table'], ours, theirs, strict=True)
            for name, got, expected in pairs:
                error = float((got.float() - expected).abs().max() / expected.abs().max())
                if not error < 0.02:  # neither rounding to bf16 nor to TF32 comes near it; NaN is caught
                    return f'{name} is off by {error:.1g} of its largest value'
    except Exception as error:  # no compiler, a device too old or too new: it is all the same to the caller
        return f'{type(error).__name__}: {error}'
    return None


def _unsuited(device: torch.device) -> Optional[str]:
    """Say why not even to try."""
    version = kernels.triton.__version__
    if tuple(map(int, version.split('.')[:2])) < _OLDEST_TRITON:
        return f'they need Triton {".".join(map(str, _OLDEST_TRITON))} or newer, and this is {version}'
    if device.type == 'cuda' and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST_CAPABILITY:
            return 'they need compute capability {}.{} or newer, and this is {}.{}'.format(
                *_OLDEST_CAPABILITY, *capability)
    return None
