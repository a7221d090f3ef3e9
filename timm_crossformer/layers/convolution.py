"""A convolution of the embedding in the form that suits the device."""
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.conv import strided_conv
from .plain import is_watched


@torch.jit.unused
def convolve(conv: Any, x: Tensor) -> Tensor:
    """Convolve x [B, C, H, W] in the form that suits the device, unless `conv` is no more what we made of it."""
    if isinstance(x, torch.fx.Proxy) or not _is_usual(conv):
        return conv(x)
    return strided_conv(x, conv.weight, conv.bias, conv.stride[0], conv.padding[0])


def _is_usual(conv: Any) -> bool:
    """Return whether it is a plain convolution of the kind that `strided_conv` knows."""
    if type(conv) is not nn.Conv2d or is_watched(conv) or isinstance(conv.padding, str):
        return False
    square = all(a == b for a, b in (conv.kernel_size, conv.stride, conv.padding))
    return square and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == 'zeros'
