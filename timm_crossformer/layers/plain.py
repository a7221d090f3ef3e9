"""Checks before a shortcut past modules: wide maps in parts, one kernel for a table, a convolution in other forms.

A layer that somebody replaced, hooked or patched has to get every call, so then no shortcut is taken.
"""
from typing import Sequence, Type

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module


def is_plain(module: nn.Module, kinds: Sequence[Type[nn.Module]]) -> bool:
    """Return whether a module in evaluation is made of these very classes, unobserved: we know what it does."""
    return all(type(part) in kinds and not part.training and not is_watched(part) for part in module.modules())


def is_watched(module: nn.Module) -> bool:
    """Return whether a call of the module does more than its class says: hooks, or a forward method of its own."""
    return bool(
        'forward' in module.__dict__
        or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks)


def is_eager_inference(x: Tensor) -> bool:
    """Return whether x is a plain tensor, without gradients, that nobody traces, compiles or transforms."""
    return type(x) is Tensor and not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active())
