"""The form of a network for one image size: what is exported when the size is known.

Everything that depends on the size alone is a constant: the groups, the bias of every pair of their members, the mask
of members that do not exist. Blocks that the inference form leaves alone stay as they are here, too.
"""
from typing import Optional

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn

from .inference import InferenceAttention, map_sizes
from .ops import reshape
from .ops.reference import pair_bias


def fix(model: nn.Module, image: Tensor) -> nn.Module:
    """Return a copy of a model for images of one height and width, to be exported.

    Args:
        model: Classifier or pyramid, or its inference form.
        image: Any image [1, C, H, W] of that size.
    """
    fast = reparameterize_model(model).eval()
    for block, seen in map_sizes(fast, image).items():
        if len(seen) == 1 and block.is_as_made():  # else it is called on maps of several sizes
            setattr(block, 'attn', FixedAttention(block.attn, *seen.pop()))  # noqa: B010  another type
    to_map = getattr(fast, 'to_map', None)
    if isinstance(to_map, nn.Module):
        fast.to_map = nn.Sequential(to_map, _Contiguous())  # pooled as a view, it would become a gather in ONNX
    return fast


class FixedAttention(nn.Module):
    """Attention inside the groups of a map of one size.

    Queries, keys and values are three products, whose results need not be cut; the first comes out scaled.
    """

    bias: Tensor
    mask: Optional[Tensor]

    def __init__(self, attn: InferenceAttention, height: int, width: int):
        super().__init__()
        self.num_heads = attn.num_heads
        self.height, self.width = height, width
        self.rows, self.cols = rows, cols = attn.layouts(height, width)
        weight = attn.qkv.weight.detach()
        with torch.no_grad():
            table = attn.bias_table(rows, cols, weight.device)
            bias = pair_bias(table, rows[1], cols[1]).to(weight.dtype)[None]  # 1, heads or 1, N, N
        self.register_buffer('bias', bias)
        self.register_buffer('mask', reshape.padding(height, width, rows, cols, weight))
        scale = (weight.shape[0] // (3 * attn.num_heads)) ** -0.5
        biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.detach().chunk(3)
        self.q, self.k, self.v = (
            _Linear(*layer) for layer in zip(weight.chunk(3), biases, (scale, 1., 1.), strict=True))
        self.proj = attn.proj

    def forward(self, x: Tensor) -> Tensor:
        """Attend inside the groups of tokens x [B, H, W, C]."""
        padded = reshape.pad(x, self.rows, self.cols)
        q, k, v = (
            reshape.group(layer(padded), self.num_heads, self.rows, self.cols) for layer in (self.q, self.k, self.v))
        x = reshape.ungroup(reshape.attend(q, k, v, self.bias, self.mask), self.rows, self.cols)
        return self.proj(x[:, :self.height, :self.width])


class _Linear(nn.Module):
    """A linear layer, scaled."""

    def __init__(self, weight: Tensor, bias: Optional[Tensor], scale: float):
        super().__init__()
        self.weight = nn.Parameter(weight * scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias * scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Contiguous(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()
