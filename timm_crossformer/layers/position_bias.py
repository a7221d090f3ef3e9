"""Dynamic position bias, DPB (paper, section 3.3): attention bias from relative offsets through a small MLP."""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.grouping import divide


class DynamicPosBias(nn.Module):
    """Map relative offsets, in tokens of the group, to one attention bias per head.

    Nothing is kept between calls, so nothing can be out of date.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Width of the MLP.
            num_heads: Outputs of the MLP; 1 is one bias for all heads.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.mlp = nn.Sequential(
            OffsetLinear(2, dim, **dd),
            nn.LayerNorm(dim, **dd), nn.ReLU(), nn.Linear(dim, dim, **dd),
            nn.LayerNorm(dim, **dd), nn.ReLU(), nn.Linear(dim, dim, **dd),
            nn.LayerNorm(dim, **dd), nn.ReLU(), nn.Linear(dim, num_heads, **dd),
        )

    def forward(self, offsets: Tensor) -> Tensor:
        """Compute the bias of every offset: [heads, h, w] from offsets (dy, dx) [h, w, 2] of a query from its key.

        In the precision of the parameters: the same under autocast, in training and after.
        """
        table = self.mlp(offsets) if torch.jit.is_scripting() else self._in_own_precision(offsets)
        return table.permute(2, 0, 1)

    @torch.jit.unused
    def _in_own_precision(self, offsets: Tensor) -> Tensor:
        if isinstance(offsets, torch.fx.Proxy):  # the graph is layers alone
            return self.mlp(offsets)
        device_type = offsets.device.type
        # The compiler of torch 2.9 cannot trace the question whether there is autocast; where it compiles to, there is.
        available = device_type != 'meta' and (
            torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type))
        if not available or not torch.is_autocast_enabled(device_type):
            return self.mlp(offsets)
        with torch.autocast(device_type, enabled=False):
            return self.mlp(offsets)


class OffsetLinear(nn.Linear):
    """A linear layer of whole numbers, in the precision of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform offsets [..., 2] of any dtype."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def group_offsets(height: int, width: int, legacy_size: Optional[Tuple[int, int]], device: torch.device) -> Tensor:
    """List the offsets between tokens of a group of height x width: [2 * height - 1, 2 * width - 1, 2], in fp32.

    Args:
        height: Rows of the group.
        width: Columns of the group.
        legacy_size: Group size of vit-pytorch's lookup; None for true offsets.
        device: Where to build them.
    """
    dy = torch.arange(1 - height, height, device=device)[:, None].expand(-1, 2 * width - 1)
    dx = torch.arange(1 - width, width, device=device)[None, :].expand(2 * height - 1, -1)
    if legacy_size is not None:
        # vit-pytorch tabulates offsets -w..w, rows of 2w + 1, but indexes as if rows had 2w - 1 entries.
        # Weights trained that way need the same slip.
        rows, cols = legacy_size
        entry = (dy + rows - 1) * (2 * cols - 1) + dx + cols - 1
        above = height + width  # rows of the lookup: some converters round the quotient of a negative number towards 0
        row, col = divide(entry + above * (2 * cols + 1), 2 * cols + 1)
        dy, dx = row - above - rows, col - cols
    return torch.stack([dy, dx], dim=-1).float()
