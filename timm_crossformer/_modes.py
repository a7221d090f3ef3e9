"""A model in evaluation mode for a while."""
from contextlib import ExitStack, contextmanager
from typing import Iterator

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back into its own afterwards; parts may be in different ones."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, 'training', module.training)
            module.training = False
        yield
