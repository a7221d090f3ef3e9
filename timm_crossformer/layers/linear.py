"""Linear layers and the MLP of a block, as fast as the CPU allows."""
from typing import List

import torch
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

# Below this many multiply-adds the overhead of oneDNN outweighs its speed.
_LEAST_WORK = 1 << 23

# Numbers that a wide intermediate result holds at a time in inference on a CPU, 4 MiB in fp32: whole maps would go to
# main memory and back, and above 32 MiB glibc maps fresh pages for every result, at the cost of a fault each.
_CHUNK = 1 << 20

_onednn_linear = getattr(torch.ops.mkldnn, '_linear_pointwise', None) if torch.backends.mkldnn.is_available() else None


@torch.jit.ignore
def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer; in fp32 inference on a CPU through oneDNN, 1.1 to 1.3 times as fast as PyTorch's choice.

    It is the operator that torch.compile chooses there. A shape seen for the first time costs about a millisecond
    once. Whatever is not a plain layer, or is being observed by hooks or a tracer, is called as it is;
    `torch.backends.mkldnn.flags(enabled=False)` switches the operator off.
    """
    if (
        _onednn_linear is None or torch.is_grad_enabled() or not torch.backends.mkldnn.enabled
        or torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled('cpu')
        or type(layer) is not nn.Linear or 'forward' in layer.__dict__
        or layer._forward_hooks or layer._forward_pre_hooks
    ):
        return layer(x)
    weight = layer.weight
    if (
        type(weight) is not nn.Parameter or type(x) is not Tensor
        or not x.dtype == weight.dtype == torch.float32 or not x.device.type == weight.device.type == 'cpu'
        or x.numel() * weight.shape[0] < _LEAST_WORK
    ):
        return layer(x)
    return _onednn_linear(x, weight, layer.bias, 'none', [], '')


if _onednn_linear is not None:
    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x, weight, *_, **__) -> int:
        """Count for `FlopCounterMode` what a matrix product counts."""
        return 2 * torch.Size(x).numel() * weight[0]


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
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return 0
    if type(x) is not Tensor or x.device.type != 'cpu':
        return 0
    if any(part._forward_hooks or part._forward_pre_hooks for module in modules for part in module.modules()):
        return 0
    length = max(1, _CHUNK // width)
    return length if x.numel() > 2 * length * x.shape[-1] else 0  # two chunks are not worth their overhead
