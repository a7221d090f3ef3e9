"""A convolution with a stride, in two other forms of the same sums that a CPU computes faster."""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# With fewer channels than a vector register holds, oneDNN computes the gradients of wide kernels number by number.
_FEW_CHANNELS = 16
# A convolution with this many times more weights than numbers in its input is bound by bringing them into order.
_MANY_WEIGHTS = 10


def strided_conv(x: Tensor, weight: Tensor, bias: Optional[Tensor], stride: int, padding: int) -> Tensor:
    """Convolve x [B, C, H, W] with square kernels [O, C, K, K] and zeros around.

    On a CPU in eager mode, and in graphs compiled for training, two kinds take another way. Gradients of few channels,
    the stem's: a dense convolution of blocks of stride x stride pixels, with gradients in a quarter of the time for 8
    images, a fortieth for 1. Inference with far more weights than input, as on the last map of one image: a product of
    patches, 1.1 times as fast over the whole network.
    """
    kernel = weight.shape[2]
    if x.device.type != 'cpu' or torch.jit.is_tracing() or torch.compiler.is_exporting():
        pass
    elif torch.is_grad_enabled():
        sides = kernel, x.shape[2] + 2 * padding, x.shape[3] + 2 * padding
        if x.shape[0] > 0 and x.shape[1] < _FEW_CHANNELS and all(side % stride == 0 for side in sides):
            blocks = F.pixel_unshuffle(F.pad(x, [padding] * 4), stride)
            return F.conv2d(blocks, F.pixel_unshuffle(weight, stride), bias)
    elif not torch.compiler.is_compiling() and weight.numel() > _MANY_WEIGHTS * x.numel() > 0:
        patches = F.pad(x, [padding] * 4).unfold(2, kernel, stride).unfold(3, kernel, stride)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)  # B, rows, columns, C * K * K
        return F.linear(patches, weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, stride, padding)
