"""A model in evaluation mode: for a while, or as a copy beside it."""
import copy
from contextlib import ExitStack, contextmanager
from types import MethodType, NoneType
from typing import Any, Dict, Iterator

import torch
from torch import nn

from ._torch import as_written


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into its own afterwards; parts may be in different ones."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, 'training', module.training)
            module.training = False
        yield


def evaluation_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of a model, in evaluation mode: what is done to them no other user of the model can see.

    A copy has a mode, hooks and attributes of its own; tensors, and functions that were hooked or put in the place of
    others, are those of the model. What torch.compile was asked to compile runs as it is written.

    Raises:
        ValueError: A function that was put in the place of `forward` may call modules in training mode.
    """
    copies: Dict[nn.Module, nn.Module] = {
        module: copy.deepcopy(module) if isinstance(module, torch.jit.ScriptModule) else object.__new__(type(module))
        for module in model.modules()}
    twins = dict(copies)
    copies.update({module: copies[as_written(module)] for module in twins})
    for module, twin in twins.items():
        if not isinstance(module, torch.jit.ScriptModule):
            attributes = {name: _of_copy(value, copies) for name, value in list(vars(module).items())}
            if module.training and not isinstance(attributes.get('forward'), (MethodType, NoneType)):
                raise ValueError(
                    f'A function stands in the place of `forward` of a {type(module).__name__} in training mode, and '
                    'may call it as it is. Call `eval()` first.')
            vars(twin).update(
                attributes,
                training=False,
                _modules={name: child if child is None else copies[child] for name, child in module._modules.items()},
                _forward_hooks=module._forward_hooks.copy(),
                _compiled_call_impl=None,
            )
    return copies[model].eval()


def _of_copy(value: Any, copies: Dict[nn.Module, nn.Module]) -> Any:
    """Bind a method of a module to its copy: a `forward` of its own."""
    value = as_written(value)
    bound = isinstance(value, MethodType) and isinstance(value.__self__, nn.Module)
    return MethodType(value.__func__, copies.get(value.__self__, value.__self__)) if bound else value
