"""How PyTorch runs a call, in words of those who ask, and every private name of PyTorch that the questions need.

What TorchScript compiles asks `torch.jit.is_scripting()` itself, since it reads nothing else.
"""
import contextlib
from typing import Any, ContextManager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_traced() -> bool:
    """Return whether a graph is recorded that others will run: by `torch.jit.trace`, `torch.export` or ONNX."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def is_exported() -> bool:
    """Return whether `torch.export` records this call, for ONNX or for itself."""
    return torch.compiler.is_exporting()


def is_compiled() -> bool:
    """Return whether `torch.compile` or `torch.export` reads this call."""
    return torch.compiler.is_compiling()


def computed_once(x: Tensor) -> Tensor:
    """Return x; in a graph of `torch.compile`, as a tensor in memory, not as a formula in every loop that reads it."""
    return x.as_strided(x.shape, x.stride()) if is_compiled() and not is_exported() else x


@torch.jit.unused
def is_graph() -> bool:
    """Return whether a graph is made of this call: traced, exported or compiled."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


@torch.jit.unused
def is_one_graph_for_all_sizes() -> bool:
    """Return whether small and large maps are to share a graph: traced, exported, or compiled for inference.

    Not compiled for training: Inductor would carry the formula of the choice through every kernel of a backward pass,
    and take minutes over them.
    """
    return is_traced() or (torch.compiler.is_compiling() and not torch.is_grad_enabled())


def is_known(*sizes: Any) -> bool:
    """Return whether sizes are numbers, not symbols that stand for any size."""
    if torch.compiler.is_dynamo_compiling():  # to its code a symbol is an int, but one that is below no number for sure
        return all(statically_known_true(size < 1 << 40) for size in sizes)
    return all(type(size) is int for size in sizes)


def is_symbol(x: Any) -> bool:
    """Return whether `torch.fx.symbolic_trace` passes x in place of a tensor."""
    return isinstance(x, torch.fx.Proxy)


def is_transformed() -> bool:
    """Return whether derivatives are taken by function transforms or forwards: operators must come apart for them."""
    return _is_in_function_transform() or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)


def _is_in_function_transform() -> bool:
    return torch._C._are_functorch_transforms_active()


# The compiler is to ask, not to put the question into the graph. `torch.compiler.assume_constant_result` does the same,
# and imports the compiler.
_is_in_function_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_eager_inference(x: Tensor) -> bool:
    """Return whether x is a plain tensor that nobody differentiates, records, transforms or casts on its way."""
    return type(x) is Tensor and not (
        (torch.is_grad_enabled() and x.requires_grad) or is_graph() or is_transformed()
        or torch.is_autocast_enabled(x.device.type) or is_in_torch_dispatch_mode(include_infra_modes=False)
        or _is_in_torch_function_mode())


def _is_in_torch_function_mode() -> bool:
    """Return whether a mode sees the functions that are called, but that of a default device."""
    return torch._C._len_torch_function_stack() > 0 and any(
        not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def without_autocast(device: torch.device) -> ContextManager[Any]:
    """Return a context in which layers run in the precision of their parameters."""
    # The compiler of torch 2.9 cannot trace the question whether there is autocast; where it compiles to, there is.
    available = device.type != 'meta' and (
        torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type))
    if not available or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of a module calls hooks besides, its own or those of all modules."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    of_all = (
        nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks, nn_module._global_backward_pre_hooks)
    return any(own) or any(of_all)


def as_written(compiled: Any) -> Any:
    """Return the module or function that `torch.compile` was given, or what is none of its results itself."""
    if isinstance(compiled, torch._dynamo.OptimizedModule):
        return compiled._orig_mod
    return getattr(compiled, '_torchdynamo_orig_callable', compiled) if callable(compiled) else compiled
