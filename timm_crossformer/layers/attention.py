"""Multi-head attention inside groups, with dynamic position bias: SDA and LDA alike (paper, section 3.2)."""
from typing import Optional, Tuple

import torch
from timm.layers import use_fused_attn
from torch import Tensor, nn

from ..ops.grouping import Layout, map_layout
from ..ops.operator import attend_groups
from ..ops.reference import close_groups, open_groups
from .position_bias import DynamicPosBias, group_offsets

# One node each to a tracer: the tokens of a group follow from the size of the map.
for name in ('attend_groups', 'map_layout', 'group_offsets', 'open_groups', 'close_groups'):
    torch.fx.wrap(name)


class GroupAttention(nn.Module):
    """Attention inside the groups of a token map; `grouping` is all that tells SDA from LDA.

    No group ever holds a token that does not exist. The official code pads the map and masks the padding, with the same
    result.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int,
            head_dim: Optional[int] = None,
            pos_bias: str = 'paper',
            qkv_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of a token.
            num_heads: Heads.
            head_dim: Channels per head, dim // num_heads if None.
            pos_bias: 'paper' or 'lucidrains', the form of the position bias.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_heads = num_heads
        self.head_dim = head_dim or dim // num_heads
        self.fused_attn = use_fused_attn()

        self.legacy_lookup = pos_bias == 'lucidrains'
        self.pos_bias = DynamicPosBias(dim // 4, 1, **dd) if self.legacy_lookup else DynamicPosBias(
            dim // 16, num_heads, **dd)
        self.qkv = nn.Linear(dim, 3 * num_heads * self.head_dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(num_heads * self.head_dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.set_groups()

    @torch.jit.ignore
    def set_groups(
            self,
            group_size: Tuple[int, int] = (7, 7),
            interval: int = 1,
            grouping: str = 'sda',
            fit_groups: bool = False,
    ) -> None:
        """Choose the groups.

        Args:
            group_size: G, rows and columns.
            interval: I, used by LDA.
            grouping: 'sda' or one of `LDA_GROUPINGS`.
            fit_groups: Prefer groups that divide the map.
        """
        self.group_size = group_size
        self.interval = interval
        self.grouping = grouping
        self.fit_groups = fit_groups
        self.legacy_size: Optional[Tuple[int, int]] = group_size if self.legacy_lookup else None

    def forward(self, x: Tensor) -> Tensor:
        """Attend inside the groups of tokens x [B, H, W, C]."""
        rows, cols = self.layouts(x.shape[1], x.shape[2])
        table = self.pos_bias(group_offsets(rows[1], cols[1], self.legacy_size, x.device))
        qkv = self.qkv(x)
        if self.fused_attn and not (self.attn_drop.training and self.attn_drop.p > 0.):
            x = attend_groups(qkv, table, self.num_heads, rows, cols)
        else:
            q, k, v, bias, mask, place = open_groups(qkv, table, self.num_heads, rows, cols)
            attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias + mask
            attn = self.attn_drop(attn.softmax(dim=-1))  # B * groups, heads, N, N
            x = close_groups(attn @ v, place)
        return self.proj_drop(self.proj(x))

    def layouts(self, height: int, width: int) -> Tuple[Layout, Layout]:
        """Lay out the rows and columns of a map of height x width tokens."""
        return map_layout(height, width, self.group_size, self.interval, self.grouping, self.fit_groups)
