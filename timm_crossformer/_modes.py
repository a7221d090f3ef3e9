"""A model in evaluation mode: for a while, or as a copy beside it."""
import copy
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
from torch import nn


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

    A copy has a mode, hooks and attributes of its own. Tensors are those of the model, but in scripted modules. What
    torch.compile was asked to compile runs as it is written.
    """
    # torch.compile wraps a module in another.
    inside = [(module, dict(module.named_children()).get('_orig_mod', module)) for module in model.modules()]
    copies: Dict[int, nn.Module] = {}
    for _, module in inside:
        scripted = isinstance(module, torch.jit.ScriptModule)
        copies[id(module)] = copy.deepcopy(module).eval() if scripted else object.__new__(type(module))
    copies.update({id(module): copies[id(part)] for module, part in inside})
    for _, module in inside:
        if isinstance(module, torch.jit.ScriptModule):
            continue
        attributes = dict(vars(module))
        for name, value in attributes.items():
            # Tools exchange whole tensors in these, for as long as a module runs.
            attributes[name] = value if name in ('_parameters', '_buffers') else _for_copies(value, copies)
        attributes.pop('_compiled_call_impl', None)
        attributes.update(training=False, _forward_hooks=attributes['_forward_hooks'].copy())
        vars(copies[id(module)]).update(attributes)
    return copies[id(model)]


def _for_copies(value: Any, copies: Dict[int, Any], depth: int = 5) -> Any:
    """Return what refers to the copy of each module that a value refers to; the value itself if there is none.

    Looks into containers, methods and functions that somebody put in the place of others. What they hold may hold
    itself, hence the depth.
    """
    if id(value) in copies:
        return copies[id(value)]
    kind = type(value)
    if kind is FunctionType and vars(value).get('_torchdynamo_orig_callable', kind) is vars(value).get('__wrapped__'):
        return _for_copies(value.__wrapped__, copies, depth)  # compiled
    parts, rebuild = _taken_apart(value)
    found = [_for_copies(part, copies, depth - 1) for part in parts] if depth else parts
    return value if all(a is b for a, b in zip(parts, found, strict=True)) else rebuild(found)


def _taken_apart(value: Any) -> Tuple[List[Any], Callable[[List[Any]], Any]]:
    """Return what a value holds, and a function that makes one like it of others."""
    kind = type(value)
    if kind in (list, tuple):
        return list(value), kind
    if kind in (dict, OrderedDict):
        items = list(value.items())  # at once, other threads may hook a module
        return [item for _, item in items], lambda found: kind(zip(dict(items), found, strict=True))
    if kind is MethodType:
        return [value.__self__], lambda found: MethodType(value.__func__, *found)
    if kind is partial:
        return [value.func, value.args, value.keywords], lambda found: partial(found[0], *found[1], **found[2])
    if kind is not FunctionType:
        return [], lambda found: value
    cells = [cell for cell in value.__closure__ or () if cell != CellType()]  # the others are empty still

    def rebuild(found: List[Any]) -> Any:
        # A cell is shared with other functions, so one that may stay has to.
        new = {id(cell): cell if cell.cell_contents is part else CellType(part)
               for cell, part in zip(cells, found[2:], strict=True)}
        closure = tuple(new.get(id(cell), cell) for cell in value.__closure__ or ())
        made = FunctionType(value.__code__, value.__globals__, value.__name__, found[0], closure or None)
        made.__kwdefaults__ = found[1]
        vars(made).update(vars(value))
        return made

    return [value.__defaults__, value.__kwdefaults__, *[cell.cell_contents for cell in cells]], rebuild
