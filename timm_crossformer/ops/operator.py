"""The one entrance to attention inside groups: checks, the choice of a backend, the registered operator."""
import logging
import os
from functools import cache
from types import ModuleType
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._torch import is_compiled, is_known, is_traced, is_transformed
from . import cpu, reference, reshape, triton
from .grouping import Layout, axis_segments

BACKENDS = ('reference', 'cpu', 'triton')
_FORCE = 'TIMM_CROSSFORMER_ATTENTION'
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_logger = logging.getLogger(__name__)


def grouped_attention(
        qkv: Tensor,
        table: Tensor,
        num_heads: int,
        rows: Layout,
        cols: Layout,
        *,
        backend: Optional[str] = None,
) -> Tensor:
    """Attend inside the groups of a map of tokens, with a bias for every offset: SDA and LDA alike.

    Tokens beyond the map, which a layout may name, do not exist: they neither attend nor are attended to.

    Args:
        qkv: Queries, keys and values [B, H, W, 3 * C], each head by head, of floating point numbers.
        table: Position biases [heads or 1, 2 * TH - 1, 2 * TW - 1]. Entry (TH - 1 + dy, TW - 1 + dx) is added to the
            score of a query that lies dy rows below and dx columns right of its key, counted in tokens of the group.
            TH x TW is at least as large as a group.
        num_heads: Heads, from 1 up; C is a multiple of it.
        rows: Layout of the rows (regions, size, interval), each from 1 up: row
            region * size * interval + member * interval + phase is a member of the group (region, phase).
        cols: Layout of the columns.
        backend: 'reference' (gather and mask, any device), 'cpu' (runs of equally long groups), 'triton' (a CUDA
            kernel), or None: the environment variable TIMM_CROSSFORMER_ATTENTION if it is set, else `choose_backend`.
            Exporters, tracers and function transforms always get the reference.

    Returns:
        Tokens [B, H, W, C].

    Raises:
        ValueError: A shape, dtype, layout or backend that cannot be; it says which, and what to do.

    Source: CrossFormer, arXiv 2108.00154, sections 3.2 and 3.3.
    """
    return _dispatch(qkv, table, num_heads, rows, cols, backend)


def attend_groups(qkv: Tensor, table: Tensor, num_heads: int, rows: Layout, cols: Layout) -> Tensor:
    """Call `grouped_attention` without a choice of backend, in a form that TorchScript reads."""
    if torch.jit.is_scripting():
        return cpu.forward(qkv, table, num_heads, rows, cols)
    else:
        return _dispatch(qkv, table, num_heads, rows, cols, None)


def choose_backend(qkv: Tensor, num_heads: int) -> str:
    """Choose the backend of `grouped_attention` by device type, dtype and shape alone."""
    if qkv.device.type == 'cpu' and qkv.dtype in _FLOATS:
        return 'cpu'
    if qkv.device.type == 'cuda' and triton.is_installed() and triton.supports(qkv.dtype, _head_dim(qkv, num_heads)):
        return 'triton'
    return 'reference'


@torch.jit.unused
def _dispatch(
        qkv: Tensor, table: Tensor, num_heads: int, rows: Layout, cols: Layout, backend: Optional[str]) -> Tensor:
    if is_traced():
        return _pure(qkv, rows, cols).grouped_attention(qkv, table, num_heads, rows, cols)
    if not is_compiled():
        _check_arguments(qkv, table, num_heads, rows, cols)
    backend = backend or os.environ.get(_FORCE)
    if backend:
        _check_backend(backend, qkv, num_heads)
    else:
        backend = choose_backend(qkv, num_heads)
    if backend == 'reference' or _needs_reference(backend):
        return reference.grouped_attention(qkv, table, num_heads, rows, cols)
    if backend == 'cpu' and _comes_apart(qkv, rows, cols):
        return reshape.grouped_attention(qkv, table, num_heads, rows, cols)
    save = backend == 'triton' and torch.is_grad_enabled() and (qkv.requires_grad or table.requires_grad)
    return _operator(qkv, table, num_heads, rows, cols, backend, save)[0]


def _pure(qkv: Tensor, rows: Layout, cols: Layout) -> ModuleType:
    """Choose what others will run, without this package: their sizes are symbols, or it is one size."""
    return reshape if is_known(*qkv.shape[1:], *rows, *cols) else reference


def _comes_apart(qkv: Tensor, rows: Layout, cols: Layout) -> bool:
    """Return whether Inductor gains from seeing attention: compiled for inference, with nothing to pad."""
    return is_compiled() and not torch.is_grad_enabled() and (
        is_known(*qkv.shape[1:], *rows, *cols) and reshape.is_full(qkv.shape[1], qkv.shape[2], rows, cols))


def _needs_reference(backend: str) -> bool:
    """Return whether something other than device, dtype and shape rules a backend out."""
    if is_transformed():
        reason = 'a function transform or forward-mode derivative needs operators that PyTorch can take apart'
    else:
        return False
    if not is_compiled():
        _log_once(f'grouped_attention runs as the reference: {reason}.')
    return True


@cache
def _log_once(message: str) -> None:
    _logger.debug(message)


def _head_dim(qkv: Tensor, num_heads: int) -> int:
    return qkv.shape[3] // (3 * num_heads)


def _check_backend(backend: str, qkv: Tensor, num_heads: int) -> None:
    """Raise ValueError unless a backend that was asked for can serve."""
    if backend not in BACKENDS:
        raise ValueError(
            f'`backend` is one of {", ".join(BACKENDS)}, got {backend!r}. Leave it out, or unset {_FORCE}.')
    if backend == 'cpu' and qkv.device.type != 'cpu':
        raise ValueError(
            f"Backend 'cpu' needs tensors on a CPU, got them on {qkv.device}. Use 'reference', or move them.")
    if backend == 'triton':
        if not triton.is_installed():
            raise ValueError("Backend 'triton' needs the package triton, which is missing. Install it or use another.")
        if qkv.device.type != 'cuda' and not triton.is_interpreted():
            raise ValueError(
                f"Backend 'triton' needs tensors on a CUDA device, got them on {qkv.device}. "
                'Move them, or use another.')
        if not triton.supports(qkv.dtype, _head_dim(qkv, num_heads)):
            raise ValueError(
                f"Backend 'triton' computes fp16, bf16 and fp32 with heads of up to 128 channels, got {qkv.dtype} and "
                f"{_head_dim(qkv, num_heads)}. Use 'reference'.")


def _check_arguments(qkv: Tensor, table: Tensor, num_heads: int, rows: Sequence[int], cols: Sequence[int]) -> None:
    """Raise ValueError unless shapes, dtypes and layouts fit."""
    if qkv.ndim != 4 or qkv.shape[1] < 1 or qkv.shape[2] < 1:
        raise ValueError(f'`qkv` needs shape [B, H, W, 3 * C] with at least one token, got {list(qkv.shape)}.')
    if num_heads < 1 or qkv.shape[3] == 0 or qkv.shape[3] % (3 * num_heads):
        raise ValueError(
            f'The last dimension of `qkv` needs to be 3 * heads * channels per head, got {qkv.shape[3]} with '
            f'num_heads={num_heads}. Pass queries, keys and values joined, and their number of heads.')
    if not qkv.is_floating_point() or not table.is_floating_point():
        raise ValueError(f'`qkv` and `table` need a floating point dtype, got {qkv.dtype} and {table.dtype}.')
    if qkv.device != table.device:
        raise ValueError(f'`qkv` and `table` need one device, got {qkv.device} and {table.device}. Move one of them.')
    if table.ndim != 3 or table.shape[0] not in (1, num_heads) or table.shape[1] % 2 == 0 or table.shape[2] % 2 == 0:
        raise ValueError(
            f'`table` needs shape [{num_heads} or 1, 2 * TH - 1, 2 * TW - 1], got {list(table.shape)}.')
    for name, n, layout, width in (('rows', qkv.shape[1], rows, table.shape[1]),
                                   ('cols', qkv.shape[2], cols, table.shape[2])):
        if len(layout) != 3 or min(layout) < 1:
            raise ValueError(f'`{name}` needs (regions, size, interval), each from 1 up, got {tuple(layout)}.')
        regions, size, interval = layout
        if regions * size * interval < n:
            raise ValueError(
                f'`{name}` needs to cover the map: regions * size * interval of {tuple(layout)} is '
                f'{regions * size * interval}, less than {n}. Use `ops.grouping.map_layout`.')
        longest = min(size, -(-n // interval))
        if width < 2 * longest - 1:
            raise ValueError(
                f'`table` needs 2 * {longest} - 1 offsets for the groups of `{name}`, got {width}. '
                'Compute it for a group at least that long.')


def _forward(
        qkv: Tensor, table: Tensor, num_heads: int, rows: List[int], cols: List[int], backend: str, save: bool = False,
) -> Tuple[Tensor, Tensor]:
    """Return the tokens; if `save`, what `triton.backward` needs beside them, else a tensor without numbers."""
    _check_arguments(qkv, table, num_heads, rows, cols)
    given = qkv, table, num_heads, _layout(rows), _layout(cols)
    if backend == 'triton' and triton.works_on(qkv, *given[2:], backward=False):
        return triton.forward(*given, save)
    if save:
        return reference.attention_and_logsumexp(*given)
    attend = cpu.forward if backend == 'cpu' else reference.grouped_attention
    return attend(*given), qkv.new_empty(0, dtype=torch.float32)


def _backward(
        grad: Tensor, qkv: Tensor, table: Tensor, out: Optional[Tensor], logsumexp: Tensor, num_heads: int,
        rows: List[int], cols: List[int], backend: str,
) -> Tuple[Tensor, Tensor]:
    given = num_heads, _layout(rows), _layout(cols)
    if out is not None and backend == 'triton' and triton.works_on(qkv, *given, backward=True):
        return triton.backward(grad, qkv, table, out, logsumexp, *given)
    return cpu.backward(grad, qkv, table, *given)  # right on any device


def _fake_forward(
        qkv: Tensor, table: Tensor, num_heads: int, rows: Any, cols: Any, backend: str, save: bool = False,
) -> Tuple[Tensor, Tensor]:
    B, H, W, C = qkv.shape
    logsumexp = qkv.new_empty([B, H, W, num_heads] if save else [0], dtype=torch.float32)
    return qkv.new_empty([B, H, W, C // 3]), logsumexp


def _fake_backward(
        grad: Tensor, qkv: Tensor, table: Tensor, out: Optional[Tensor], logsumexp: Tensor, num_heads: int,
        rows: Any, cols: Any, backend: str,
) -> Tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), table.new_empty(table.shape)


def _remember(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, Tensor]) -> None:
    out, logsumexp = output
    *ctx.arguments, save = inputs[2:]
    ctx.save_for_backward(*inputs[:2], out if save else None, logsumexp)
    ctx.mark_non_differentiable(logsumexp)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Optional[Tensor], _: Any) -> Tuple[Optional[Tensor], ...]:
    """Return the gradients of all arguments; by way of the reference where they will be differentiated themselves."""
    if grad is None:
        return (None,) * 7
    saved = ctx.saved_tensors  # checkpointing allows to ask once
    if not torch.is_grad_enabled():
        grads = torch.ops.timm_crossformer.grouped_attention_backward(grad, *saved, *ctx.arguments)
        return (*grads, None, None, None, None, None)
    num_heads, rows, cols, _ = ctx.arguments
    wanted = [i for i in (0, 1) if ctx.needs_input_grad[i]]
    out = reference.grouped_attention(saved[0], saved[1], num_heads, _layout(rows), _layout(cols))
    found = iter(torch.autograd.grad(out, [saved[i] for i in wanted], grad, create_graph=True))
    return (*(next(found) if i in wanted else None for i in (0, 1)), None, None, None, None, None)


def _layout(numbers: Sequence[int]) -> Layout:
    return numbers[0], numbers[1], numbers[2]


def _count(qkv: Sequence[int], rows: Sequence[int], cols: Sequence[int]) -> int:
    """Count the operations of one product of all pairs of tokens that exist, given the shape of qkv."""
    batch, height, width, channels = qkv
    pairs = sum(
        r[1] * r[4] * c[1] * c[4] * (r[2] * c[2]) ** 2
        for r in axis_segments(height, _layout(rows)) for c in axis_segments(width, _layout(cols)))
    return 2 * batch * pairs * channels // 3


def _flops(qkv: Any, table: Any, num_heads: int, rows: List[int], cols: List[int], *_: Any, **__: Any) -> int:
    """Count scores, and the sum of values."""
    return 2 * _count(qkv, rows, cols)


def _flops_backward(
        grad: Any, qkv: Any, table: Any, out: Any, logsumexp: Any, num_heads: int, rows: List[int], cols: List[int],
        *_: Any, **__: Any,
) -> int:
    """Count scores again, and the gradients of scores, queries, keys and values."""
    return 5 * _count(qkv, rows, cols)


def _register() -> None:
    """Register the operators with PyTorch, for the process: importing the package anew finds them."""
    arguments = 'int num_heads, SymInt[] rows, SymInt[] cols, str backend'
    for name, signature, run, fake in (
            ('grouped_attention', f'(Tensor qkv, Tensor table, {arguments}, bool save=False) -> (Tensor, Tensor)',
             _forward, _fake_forward),
            ('grouped_attention_backward',
             f'(Tensor grad, Tensor qkv, Tensor table, Tensor? out, Tensor logsumexp, {arguments}) -> (Tensor, Tensor)',
             _backward, _fake_backward)):
        name = f'timm_crossformer::{name}'
        torch.library.define(name, signature, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, 'CompositeExplicitAutograd', run)
        torch.library.register_fake(name, fake)
    torch.library.register_autograd('timm_crossformer::grouped_attention', _differentiate, setup_context=_remember)
    register_flop_formula(torch.ops.timm_crossformer.grouped_attention)(_flops)
    register_flop_formula(torch.ops.timm_crossformer.grouped_attention_backward)(_flops_backward)


# Tools take a graph apart down to this operator; what it does is the backend's business. `torch.library.custom_op`
# would look for shared memory among arguments and results in every call, 2% of the time of one image on a CPU.
if not hasattr(torch.ops.timm_crossformer, 'grouped_attention'):
    _register()
_operator: Any = torch.ops.timm_crossformer.grouped_attention.default
