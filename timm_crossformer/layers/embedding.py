"""Cross-scale embedding, CEL (paper, section 3.1): parallel convolutions of several kernel sizes, one stride."""
from typing import Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import is_graph

for name in ('check_map', 'pad_to_multiple'):  # sizes decide: one node each to a tracer
    torch.fx.wrap(name)


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
        if self.norm_first:
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = prepare_map(x, self.stride)
        x = join_maps([conv(x) for conv in self.convs])
        if not self.norm_first:
            x = self.norm(x)
        return x.permute(0, 3, 1, 2)


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


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Continue x [B, C, H, W] with zeros at the bottom and right until `multiple` divides both sides."""
    H, W = x.shape[2], x.shape[3]
    pad_h, pad_w = (H + multiple - 1) // multiple * multiple - H, (W + multiple - 1) // multiple * multiple - W
    if torch.jit.is_scripting():
        return x if pad_h == 0 and pad_w == 0 else F.pad(x, [0, pad_w, 0, pad_h])
    if not is_graph() and pad_h == 0 and pad_w == 0:  # a graph pads by 0 instead of branching
        return x
    return F.pad(x, [0, pad_w, 0, pad_h])


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
