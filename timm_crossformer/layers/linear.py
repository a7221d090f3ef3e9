"""Linear layers and the MLP of a block, as fast as the CPU allows."""
import torch
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

# Below this many multiply-adds the overhead of oneDNN outweighs its speed.
_LEAST_WORK = 1 << 23

# Numbers that the hidden layer of an MLP holds at a time in inference on a CPU, 4 MiB in fp32: whole maps would go to
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
    """timm's MLP, in inference on a CPU over some tokens at a time."""

    def __init__(self, in_features: int, hidden_features: int, **kwargs):
        super().__init__(in_features, hidden_features, **kwargs)
        self.hidden_features = hidden_features

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens [..., C]."""
        if torch.jit.is_scripting():
            return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != 'cpu':
            return self._transform(x)
        parts = [self._transform(part) for part in x.flatten(0, -2).split(max(1, _CHUNK // self.hidden_features))]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)

    @torch.jit.ignore
    def _transform(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(linear(self.fc1, x)))
        return self.drop2(linear(self.fc2, self.norm(x)))
