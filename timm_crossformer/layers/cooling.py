"""Amplitude cooling layer, ACL (CrossFormer++ paper, section 4.2): damps activations that grow with depth."""
from typing import Callable

from torch import Tensor, nn


class AmplitudeCooling(nn.Module):
    """LayerNorm of a depth-wise 3 x 3 convolution, without a residual."""

    def __init__(self, dim: int, norm_layer: Callable[..., nn.Module] = nn.LayerNorm, device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Cool tokens x [B, H, W, C]."""
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(x)
