"""What a CPU computes faster another way, in eager mode: linear layers, convolutions of an image, wide maps.

Whatever is not a plain layer, or is being observed by hooks or a tracer, is called as it is. The operators of oneDNN
take part while `torch.backends.mkldnn.enabled` is true.
"""
from typing import Any, List, Optional, Tuple, Type, cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.flop_counter import register_flop_formula

# Below this many multiply-adds the overhead of oneDNN outweighs its speed.
_LEAST_WORK = 1 << 23

# Numbers that a wide intermediate result holds at a time in inference on a CPU, 4 MiB in fp32: whole maps would go to
# main memory and back, and above 32 MiB glibc maps fresh pages for every result, at the cost of a fault each.
_CHUNK = 1 << 20

# With fewer channels than a vector register holds, oneDNN computes the gradients of wide kernels number by number.
_FEW_CHANNELS = 16

_onednn_linear: Any = None
if torch.backends.mkldnn.is_available():
    _onednn_linear = getattr(torch.ops.mkldnn, '_linear_pointwise', None)


def _is_eager(x: Any) -> bool:
    """Return whether x is a plain tensor on a CPU that nobody traces or compiles."""
    return type(x) is Tensor and x.device.type == 'cpu' and not (
        torch.compiler.is_compiling() or torch.jit.is_tracing())


def _is_observed(module: nn.Module) -> bool:
    """Return whether hooks wait for a call of the module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or _has_any_global_hook())


def _is_plain(layer: nn.Module, kind: Type[nn.Module]) -> bool:
    """Return whether a call of the layer is the product that its class stands for and nothing else."""
    return type(layer) is kind and 'forward' not in layer.__dict__ and not _is_observed(layer)


@torch.jit.ignore
def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer; in fp32 on a CPU through oneDNN, 1.1 to 1.3 times as fast as PyTorch's choice.

    It is the operator that torch.compile chooses there. A shape seen for the first time costs about a millisecond
    once.
    """
    if (
        _onednn_linear is None or not torch.backends.mkldnn.enabled
        or not _is_eager(x) or not _is_plain(layer, nn.Linear) or type(layer.weight) is not nn.Parameter
        or not x.dtype == layer.weight.dtype == torch.float32 or layer.weight.device.type != 'cpu'
        or x.numel() * layer.weight.shape[0] < _LEAST_WORK
        or torch.is_autocast_enabled('cpu')
        or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        return layer(x)
    if torch.is_grad_enabled():
        return _Linear.apply(x, layer.weight, layer.bias)
    return _onednn_linear(x, layer.weight, layer.bias, 'none', [], '')


class _Linear(torch.autograd.Function):
    """oneDNN's linear operator, which has no gradient of its own, with one.

    The gradient of the weight is left to PyTorch: that product is as fast there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias, 'none', [], '')

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        with torch.autocast('cpu', enabled=False):  # as in the forward pass
            if ctx.needs_input_grad[0] and torch.is_grad_enabled():  # for second derivatives
                grad_x = grad @ weight
            elif ctx.needs_input_grad[0]:
                grad_x = _onednn_linear(grad.contiguous(), weight.t(), None, 'none', [], '')
            rows = grad.reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[1]:
                grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
            if ctx.needs_input_grad[2]:
                grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


if _onednn_linear is not None:
    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x, weight, *_, **__) -> int:
        """Count for `FlopCounterMode` what a matrix product counts."""
        return 2 * torch.Size(x).numel() * weight[0]


@torch.jit.ignore
def strided_conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution to x [B, C, H, W], whose sides its stride divides.

    Where gradients are wanted on a CPU, one of few channels is computed as a dense one of blocks of stride x stride
    pixels: the same sums in another order. The stem's gradients take a quarter of the time that way in a batch of 8
    images, and a fortieth in one of 1 or 2.
    """
    stride, pad = layer.stride[0], cast(Tuple[int, int], layer.padding)[0]
    if (
        not torch.is_grad_enabled() or not _is_eager(x) or not _is_plain(layer, nn.Conv2d)
        or layer.in_channels >= _FEW_CHANNELS or layer.kernel_size[0] % stride != 0
    ):
        return layer(x)
    nhwc = torch.channels_last
    x, weight = (F.pixel_unshuffle(t, stride) for t in (F.pad(x, [pad] * 4), layer.weight))
    return F.conv2d(x.contiguous(memory_format=nhwc), weight.contiguous(memory_format=nhwc), layer.bias)


class Mlp(TimmMlp):
    """timm's MLP with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens [..., C]."""
        if torch.jit.is_scripting():
            return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
        x = self.drop1(self.act(linear(self.fc1, x)))
        return self.drop2(linear(self.fc2, self.norm(x)))


@torch.jit.ignore
def chunk_length(x: Tensor, width: int, modules: List[nn.Module]) -> int:
    """Return how many of the tokens x [..., C] to pass through modules at once, where they make `width` numbers of one.

    Inference on a CPU takes a few at a time if there are many. 0 stands for all of them: elsewhere, and where somebody
    observes what a module does with a map.
    """
    if torch.is_grad_enabled() or not _is_eager(x):
        return 0
    if any(_is_observed(part) for module in modules for part in module.modules()):
        return 0
    length = max(1, _CHUNK // width)
    return length if x.numel() > 2 * length * x.shape[-1] else 0  # two chunks are not worth their overhead
