"""Products and convolutions on a CPU whose weights are in an order of oneDNN's already. Without gradients.

PyTorch brings a weight into that order in every call, which for one image takes as long as the work itself. The
operators are those that its own compiler uses for frozen weights; they have no public name.
"""
from functools import cache
from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def suits(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN can apply a weight to x: on a CPU, in a precision that the processor computes in."""
    return x.device.type == weight.device.type == 'cpu' and x.dtype == weight.dtype and x.numel() > 0 and (
        _computes(x.dtype))


@cache
def _computes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linear(weight: Tensor) -> Tensor:
    """Bring the weight of a linear layer into oneDNN's order."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def linear(x: Tensor, packed: Tensor, bias: Optional[Tensor], gelu: bool) -> Tensor:
    """Multiply x [..., in] by a packed weight, add a bias, and apply GELU if asked for."""
    if gelu and _joins_gelu():
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, 'gelu', [], 'none')
    x = torch.ops.mkldnn._linear_pointwise(x, packed, bias, 'none', [], '')
    return F.gelu(x) if gelu else x


@cache
def _joins_gelu() -> bool:
    # With AVX-512 it makes the network 1.05 times as fast; with AVX2, where PyTorch's own GELU is faster, slower.
    return torch.backends.cpu.get_cpu_capability() == 'AVX512'


def pack_conv(weight: Tensor, stride: int, padding: int, shape: Sequence[int]) -> Tensor:
    """Bring the weight of a convolution into oneDNN's order for inputs of a shape [B, C, H, W]."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, [padding, padding], [stride, stride], [1, 1], 1, list(shape))


def conv(x: Tensor, packed: Tensor, bias: Optional[Tensor], stride: int, padding: int) -> Tensor:
    """Convolve x [B, C, H, W] with a packed weight."""
    return torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, [padding, padding], [stride, stride], [1, 1], 1, 'none', [], '')
