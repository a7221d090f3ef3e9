"""What a CPU computes faster another way: linear layers, convolutions of an image, wide maps, stochastic depth.

Whatever is not a plain layer, or is being observed by hooks or a tracer, is called as it is. The operators of oneDNN
take part while `torch.backends.mkldnn.enabled` is true.
"""
from typing import Any, List, Optional, Sequence, Tuple, Type, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils.flop_counter import flop_registry, register_flop_formula

# Below this many multiply-adds the overhead of oneDNN outweighs its speed.
_LEAST_WORK = 1 << 23

# Numbers of a map that pass through a block at a time in inference on a CPU, 2 MiB in fp32, four times as much within
# the block: whole maps would go to main memory and back at every step, and above 32 MiB glibc maps fresh pages for
# every result, at the cost of a fault each.
_CHUNK = 1 << 19

# With fewer channels than a vector register holds, oneDNN computes the gradients of wide kernels number by number.
_FEW_CHANNELS = 16

# A convolution with this many times more weights than numbers in its input is bound by reading the weights.
_MANY_WEIGHTS = 10

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
        or nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks)


def is_plain(layer: nn.Module, kind: Type[nn.Module]) -> bool:
    """Return whether a call of the layer is the product that its class stands for and nothing else."""
    return type(layer) is kind and 'forward' not in layer.__dict__ and not _is_observed(layer)


def consists_of(module: nn.Module, kinds: Sequence[Type[nn.Module]]) -> bool:
    """Return whether a module has plain layers of these kinds only."""
    return all(type(part) in kinds and is_plain(part, type(part)) for part in module.modules())


def is_made_of(module: nn.Module, kinds: Sequence[Type[nn.Module]]) -> bool:
    """Return whether a module has plain layers of these kinds only, with fp32 parameters on a CPU."""
    return consists_of(module, kinds) and all(_is_fp32(p, nn.Parameter) for p in module.parameters())


def _is_fp32(x: Tensor, kind: Type[Tensor]) -> bool:
    return type(x) is kind and x.device.type == 'cpu' and x.dtype == torch.float32


def is_plain_fp32(x: Tensor) -> bool:
    """Return whether x is computed with in fp32 on a CPU, in eager mode."""
    return (
        not torch.compiler.is_compiling() and _is_fp32(x, Tensor)
        and not torch.is_autocast_enabled('cpu') and not _is_transformed()
    )


def _is_ours(layer: nn.Module, kind: Type[nn.Module], x: Tensor) -> bool:
    """Return whether the way to compute a layer of x is ours to choose: one of fp32 numbers on a CPU, in eager mode."""
    return is_plain_fp32(x) and is_plain(layer, kind) and _is_fp32(cast(Tensor, layer.weight), nn.Parameter)


def in_inference_graph(x: Tensor) -> bool:
    """Return whether a graph is being compiled for inference of x, fp32 numbers on a CPU."""
    return (
        torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not torch.is_grad_enabled()
        and _is_fp32(x, Tensor) and not torch.is_autocast_enabled('cpu')
    )


def _is_transformed() -> bool:
    """Return whether a tracer, or a function transform such as `torch.func.vmap`, looks on."""
    return (
        torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN is there and a product by it worth its overhead."""
    enabled = _onednn_linear is not None and bool(torch.backends.mkldnn.enabled)
    return enabled and x.numel() * weight.shape[0] >= _LEAST_WORK


@torch.jit.ignore
def linear(layer: Any, x: Tensor, act: Optional[nn.Module] = None) -> Tensor:
    """Apply a linear layer and then `act`; in fp32 on a CPU through oneDNN, 1.1 to 1.3 times as fast as PyTorch.

    Without gradients oneDNN applies a GELU to results that are still in the cache. A shape seen for the first time
    costs about a millisecond once.
    """
    if not _is_ours(layer, nn.Linear, x):
        x = layer(x)
    elif torch.is_grad_enabled():
        x = _Linear.apply(x, layer.weight, layer.bias) if _pays(x, layer.weight) else layer(x)
    elif act is not None and is_exact_gelu(act):
        return product(x, layer.weight, layer.bias, True)
    else:
        x = product(x, layer.weight, layer.bias)
    return x if act is None else act(x)


def is_exact_gelu(act: nn.Module) -> bool:
    """Return whether the activation is the GELU that `product` knows."""
    return is_plain(act, nn.GELU) and act.approximate == 'none'


def product(x: Tensor, weight: Tensor, bias: Optional[Tensor], gelu: bool = False) -> Tensor:
    """Multiply without gradients, then add, then apply a GELU if wanted."""
    if _pays(x, weight):
        return _onednn_linear(x, weight, bias, *(('gelu', [], 'none') if gelu else ('none', [], '')))
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b for a matrix b, by oneDNN and without gradients."""
    return _onednn_linear(a.contiguous(), b.t(), None, 'none', [], '')


class _Linear(torch.autograd.Function):
    """oneDNN's linear operator, which has no gradient of its own, with one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias, 'none', [], '')

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        with torch.autocast('cpu', enabled=False):  # as in the forward pass
            multiply = torch.matmul if torch.is_grad_enabled() else _multiply  # for second derivatives
            if ctx.needs_input_grad[0]:
                grad_x = multiply(grad, weight)
            rows = grad.reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[1]:
                inputs = x.reshape(-1, x.shape[-1])
                if inputs.shape[1] < rows.shape[1] <= rows.shape[0]:  # up to three times as fast for many tokens
                    grad_weight = multiply(inputs.t(), rows).t()
                else:
                    grad_weight = multiply(rows.t(), inputs)
            if ctx.needs_input_grad[2]:
                grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


if _onednn_linear is not None:
    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x, weight, *_, **__) -> int:
        """Count for `FlopCounterMode` what a matrix product counts."""
        return 2 * torch.Size(x).numel() * weight[0]


if torch.ops.aten.baddbmm_ not in flop_registry:  # attention's; PyTorch counts the form that is not in place
    flop_registry[torch.ops.aten.baddbmm_] = flop_registry[torch.ops.aten.baddbmm]


def is_plain_conv(layer: nn.Module, stride: int) -> bool:
    """Return whether a convolution is what `CrossScaleEmbed` makes: zeros around, nothing but a stride."""
    if not is_plain(layer, nn.Conv2d):
        return False
    conv = cast(nn.Conv2d, layer)
    pad = (conv.kernel_size[0] - stride) // 2
    return (
        conv.stride == (stride, stride) and conv.padding == (pad, pad) and conv.padding_mode == 'zeros'
        and conv.kernel_size[0] == conv.kernel_size[1] and conv.dilation == (1, 1) and conv.groups == 1)


@torch.jit.ignore
def strided_conv(layer: nn.Conv2d, x: Tensor, stride: int) -> Tensor:
    """Apply a convolution to x [B, C, H, W], whose sides the stride divides.

    On a CPU two kinds are computed as other products, the same sums in another order. One of few channels whose
    gradients are wanted, the stem's, becomes a dense one of blocks of stride x stride pixels: gradients take a quarter
    of the time in a batch of 8 images, and a fortieth in one of 1 or 2. One with far more weights than input, as on
    the last map of one image, becomes a linear layer of patches: oneDNN would bring all weights into another order.
    """
    if not is_plain_conv(layer, stride):
        return layer(x)
    pad = (layer.kernel_size[0] - stride) // 2
    if not torch.is_grad_enabled():
        if not _is_ours(layer, nn.Conv2d, x):
            return layer(x)
        return convolve(x, layer.weight, layer.bias, stride, pad)
    if not _is_eager(x) or _is_transformed() or len(x) == 0:
        return layer(x)
    if layer.in_channels >= _FEW_CHANNELS or layer.kernel_size[0] % stride != 0:
        return layer(x)
    nhwc = torch.channels_last
    x, weight = (F.pixel_unshuffle(t, stride) for t in (F.pad(x, [pad] * 4), layer.weight))
    return F.conv2d(x.contiguous(memory_format=nhwc), weight.contiguous(memory_format=nhwc), layer.bias)


def convolve(x: Tensor, weight: Tensor, bias: Optional[Tensor], stride: int, pad: int) -> Tensor:
    """Convolve without gradients; the result lies in memory with channels last."""
    if weight.numel() < _MANY_WEIGHTS * x.numel() or not _pays(x, weight):
        return F.conv2d(x, weight, bias, stride, pad).contiguous(memory_format=torch.channels_last)
    kernel = weight.shape[2]
    patches = F.pad(x, [pad] * 4).unfold(2, kernel, stride).unfold(3, kernel, stride)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)  # B, rows, columns, C * kernel * kernel
    return _onednn_linear(patches, weight.flatten(1), bias, 'none', [], '').permute(0, 3, 1, 2)


class Mlp(TimmMlp):
    """timm's MLP with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens [..., C]."""
        if torch.jit.is_scripting():
            return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
        x = self.drop1(linear(self.fc1, x, self.act))
        return self.drop2(linear(self.fc2, self.norm(x)))


@torch.jit.ignore
def chunk_length(x: Tensor, modules: List[nn.Module]) -> int:
    """Return how many of the tokens x [..., C] to pass through modules at once.

    Inference on a CPU takes a few at a time if there are many. 0 stands for all of them: elsewhere, and where somebody
    observes what a module does with a map.
    """
    if torch.is_grad_enabled() or not _is_eager(x):
        return 0
    length = tokens_per_chunk(x)
    if length and any(part.training or _is_observed(part) for module in modules for part in module.modules()):
        return 0
    return length


def tokens_per_chunk(x: Tensor) -> int:
    """Return how many of the tokens x [..., C] make a chunk; 0 for all of them."""
    return max(1, _CHUNK // x.shape[-1]) if x.numel() > 2 * _CHUNK else 0  # two chunks are not worth their overhead


@torch.jit.ignore
def add_branch(x: Tensor, norm: nn.Module, branch: nn.Module, drop_path: nn.Module) -> Tensor:
    """Return x + drop_path(branch(norm(x))) for x [B, H, W, C].

    Eager mode on a CPU leaves out the images whose result stochastic depth drops: the same sums and gradients for less.
    If it drops all of them, none is left out, so that every parameter always has a gradient.
    """
    drops = drop_path.training and is_plain(drop_path, DropPath) and _is_eager(x) and not _is_transformed()
    if not drops or any(_is_observed(part) for module in (norm, branch) for part in module.modules()):
        return x + drop_path(branch(norm(x)))
    scale = drop_path(x.new_ones([x.shape[0], 1, 1, 1]))
    kept = scale.flatten().nonzero().flatten()
    if len(kept) in (0, len(x)):
        return x + branch(norm(x)) * scale
    return x.index_add(0, kept, (branch(norm(x.index_select(0, kept))) * scale[kept]).to(x.dtype))
