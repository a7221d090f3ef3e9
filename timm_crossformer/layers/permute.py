"""A change of the order of dimensions as a module, so that modules called one after another are the network."""
import torch
from torch import Tensor, nn


class Permute(nn.Module):
    """Put the four dimensions of a map into another order; a view."""

    def __init__(self, *dims: int):
        """
        Args:
            dims: For each dimension of the result, the dimension of the input that it is.
        """
        super().__init__()
        self.dims = list(dims)

    def forward(self, x: Tensor) -> Tensor:
        """Permute x."""
        return torch.permute(x, self.dims)

    def extra_repr(self) -> str:
        """Name the order."""
        return ', '.join(map(str, self.dims))
