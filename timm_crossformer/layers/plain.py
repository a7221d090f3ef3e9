"""The questions before a way past the modules is taken: parts of wide maps, and the kernel of a table of biases.

Whoever replaces, hooks or patches a layer gets every call of it: then neither way is taken.
"""
from typing import Sequence, Type

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module


def is_plain(module: nn.Module, kinds: Sequence[Type[nn.Module]]) -> bool:
    """Return whether a module in evaluation is made of these very classes, unobserved: we know what it does."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return False
    return all(
        type(part) in kinds and not part.training and 'forward' not in part.__dict__
        and not part._forward_hooks and not part._forward_pre_hooks
        for part in module.modules())


def is_eager_inference(x: Tensor) -> bool:
    """Return whether x is a plain tensor, without gradients, that nobody traces, compiles or transforms."""
    return type(x) is Tensor and not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active())
