"""Cross-scale embedding, CEL (paper, section 3.1): parallel convolutions of several kernel sizes, one stride."""
from typing import Any, Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from .cpu import convolve, in_inference_graph, is_made_of, is_plain_conv, strided_conv
from .operator import operator


class CrossScaleEmbed(nn.Module):
    """Embed a map at several scales: the stem, and the downsampling between stages.

    The smallest kernel gets half of the channels, the next one a quarter, and so on; the last one gets the rest.
    A map that the stride does not divide is continued with zeros at the bottom and right.
    """

    def __init__(
            self,
            in_chans: int,
            out_chans: int,
            kernel_sizes: Tuple[int, ...],
            stride: int,
            norm_layer: Optional[Callable[..., nn.Module]] = None,
            norm_first: bool = False,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_chans: Channels of the input.
            out_chans: Channels of the output, over all kernels.
            kernel_sizes: In ascending order, each at least the stride.
            stride: Stride of every convolution.
            norm_layer: Norm over channels, None for none.
            norm_first: Norm of the input, before padding (between stages), instead of the output (stem).
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans
        self.stride = stride
        splits = [out_chans // 2 ** (i + 1) for i in range(len(kernel_sizes) - 1)]
        splits.append(out_chans - sum(splits))
        self.norm_first = norm_first
        self.convs = nn.ModuleList([
            nn.Conv2d(in_chans, chans, kernel, stride=stride, padding=(kernel - stride) // 2, **dd)
            for kernel, chans in zip(kernel_sizes, splits, strict=True)
        ])
        norm_dim = in_chans if norm_first else out_chans
        self.norm = norm_layer(norm_dim, **dd) if norm_layer is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Embed x [B, C, H, W] as [B, out_chans, ceil(H / stride), ceil(W / stride)], a view of NHWC memory."""
        check_map(x, self.in_chans)
        if not torch.jit.is_scripting() and self._is_one_operator(x):
            return self._in_graph(x)
        if self.norm_first:
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = prepare_map(x, self.stride)
        if torch.jit.is_scripting():
            maps = [conv(x) for conv in self.convs]
        else:
            maps = [strided_conv(conv, x, self.stride) for conv in self.convs]
        x = join_maps(maps)
        if not self.norm_first:
            x = self.norm(x)
        return x.permute(0, 3, 1, 2)

    @torch.jit.unused
    def _is_one_operator(self, x: Tensor) -> bool:
        """Return whether, in a compiled graph, the embedding is exactly what the operator computes."""
        return in_inference_graph(x) and _is_known(self)

    @torch.jit.unused
    def _in_graph(self, x: Tensor) -> Tensor:
        norm: Tuple[Any, Any, float] = (None, None, 0.)
        if type(self.norm) is nn.LayerNorm:
            norm = (self.norm.weight, self.norm.bias, self.norm.eps)
        weights, biases = [conv.weight for conv in self.convs], [conv.bias for conv in self.convs]
        return _embed(x, weights, biases, *norm, self.norm_first, self.stride).permute(0, 3, 1, 2)


@torch.compiler.assume_constant_result  # as torch.compile has it for hooks
def _is_known(embed: CrossScaleEmbed) -> bool:
    """Return whether nothing but weights tells an embedding from others of its shape."""
    return (
        all(is_made_of(part, (nn.Conv2d, nn.LayerNorm, nn.Identity)) for part in (*embed.convs, embed.norm))
        and all(is_plain_conv(conv, embed.stride) for conv in embed.convs)
        and (type(embed.norm) is nn.Identity or embed.norm.weight is not None)
    )


def _empty_map(x: Tensor, weights: List[Tensor], *args: Any) -> Tensor:
    stride: int = args[-1]
    H, W = (x.shape[2] + stride - 1) // stride, (x.shape[3] + stride - 1) // stride
    return x.new_empty([x.shape[0], H, W, sum(weight.shape[0] for weight in weights)])


# Left to itself, torch.compile copies the image for each convolution and brings all weights into another order in
# every call.
@operator('embed', _empty_map)
def _embed(
        x: Tensor,
        weights: List[Tensor],
        biases: List[Optional[Tensor]],
        norm_weight: Optional[Tensor],
        norm_bias: Optional[Tensor],
        eps: float,
        norm_first: bool,
        stride: int,
) -> Tensor:
    """Embed a map for inference in fp32 on a CPU, as eager mode does.

    Args:
        x: Map [B, C, H, W].
        weights: Of the convolutions.
        biases: Of the same.
        norm_weight: Weight of the norm, None without norm.
        (others): See `CrossScaleEmbed`.

    Returns:
        Map [B, ceil(H / stride), ceil(W / stride), channels].
    """
    if norm_weight is not None and norm_first:
        x = F.layer_norm(x.permute(0, 2, 3, 1), norm_weight.shape, norm_weight, norm_bias, eps).permute(0, 3, 1, 2)
    x = prepare_map(x, stride)
    pads = [(weight.shape[2] - stride) // 2 for weight in weights]
    x = join_maps([convolve(x, w, b, stride, pad) for w, b, pad in zip(weights, biases, pads, strict=True)])
    if norm_weight is not None and not norm_first:
        x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    return x


def prepare_map(x: Tensor, stride: int) -> Tensor:
    """Make the sides of x [B, C, H, W] multiples of the stride, in memory with channels last.

    Large kernels run several times faster on the CPU that way, and blocks want the channels of a token side by side.
    """
    # Not by a memory format, of which `torch.func.vmap` knows nothing.
    return pad_to_multiple(x, stride).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def join_maps(maps: List[Tensor]) -> Tensor:
    """Join the channels of maps [B, C, H, W] as tokens [B, H, W, C], contiguous.

    As tokens, since in a compiled graph the layout of this result would be that of all blocks that follow.
    """
    return torch.cat([m.permute(0, 2, 3, 1) for m in maps], dim=3).contiguous()


@register_notrace_function  # sizes decide
def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Continue x [B, C, H, W] with zeros at the bottom and right until `multiple` divides both sides."""
    H, W = x.shape[2], x.shape[3]
    pad_h, pad_w = (H + multiple - 1) // multiple * multiple - H, (W + multiple - 1) // multiple * multiple - W
    if torch.jit.is_scripting():
        return x if pad_h == 0 and pad_w == 0 else F.pad(x, [0, pad_w, 0, pad_h])
    if not torch.compiler.is_compiling() and pad_h == 0 and pad_w == 0:  # a graph pads by 0 instead of branching
        return x
    return F.pad(x, [0, pad_w, 0, pad_h])


@register_notrace_function
def check_map(x: Tensor, in_chans: int) -> None:
    """Raise ValueError unless x is a non-empty [B, in_chans, H, W] tensor of floating point numbers."""
    # Not timm's `_assert`: its message is made each time, and a size in a message ties a compiled graph to that size.
    if x.ndim != 4:
        raise ValueError(f'The input needs 4 dimensions [B, C, H, W], got {x.ndim}. Add a batch dimension to an image.')
    if x.shape[1] != in_chans:
        raise ValueError(
            f'The input needs {in_chans} channels in dimension 1, got {x.shape[1]}. '
            'Pass [B, C, H, W], or create the model with `in_chans`.')
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f'The input needs at least 1 x 1 pixels, got {x.shape[2]} x {x.shape[3]}.')
    if not x.is_floating_point():
        raise ValueError(
            'The input needs a floating point dtype. Scale integer images to [0, 1] and normalise them first.')
