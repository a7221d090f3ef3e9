"""The one question about what modules consist of, for the two ways past them: parts of wide maps, and a table's kernel.

Whoever replaces, hooks or patches a layer gets every call of it: then neither way is taken.
"""
from typing import Sequence, Type

from torch import nn
from torch.nn.modules import module as nn_module


def is_plain(module: nn.Module, kinds: Sequence[Type[nn.Module]]) -> bool:
    """Return whether a module in evaluation is made of these very classes, unobserved: we know what it does."""
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return False
    return all(
        type(part) in kinds and not part.training and 'forward' not in part.__dict__
        and not part._forward_hooks and not part._forward_pre_hooks
        for part in module.modules())
