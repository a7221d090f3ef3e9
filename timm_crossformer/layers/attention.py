"""Multi-head attention inside groups, with dynamic position bias: SDA and LDA alike."""
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, use_fused_attn
from torch import Tensor, nn

from .grouping import axis_segments, group_index, group_view, map_layout
from .position_bias import DynamicPosBias, expand_bias

# A position bias is built for at most this many pairs of tokens, heads included, at a time (64 MiB in fp32).
# Only `map` groups of large images come near: 4,096 tokens and 24 heads at 2048 px would need 1.6 GB.
_MAX_BIAS = 1 << 24


@register_notrace_module  # grouping depends on the size of the map
class GroupAttention(nn.Module):
    """Attention inside the groups of a token map; `grouping` is all that tells SDA from LDA.

    No group ever holds a token that does not exist: nothing is padded and, except in exported and compiled graphs,
    nothing is masked. The official code pads the map and masks the padding, with the same result.
    """

    fused_attn: torch.jit.Final[bool]
    max_bias: torch.jit.Final[int] = _MAX_BIAS

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
        self.scale = self.head_dim ** -0.5
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
        self.pos_bias.legacy_size = group_size if self.legacy_lookup else None

    def forward(self, x: Tensor) -> Tensor:
        """Attend inside the groups of x, tokens [B, H, W, C]."""
        qkv = self.qkv(x)
        if torch.jit.is_scripting():
            x = self._attend_segments(qkv)
        elif torch.compiler.is_compiling():
            x = self._attend_indexed(qkv)
        else:
            x = self._attend_segments(qkv)
        return self.proj_drop(self.proj(x))

    def _attend_segments(self, qkv: Tensor) -> Tensor:
        """Attend run by run of equally long groups: one run if groups divide the map, up to nine if they do not."""
        B, H, W, _ = qkv.shape
        rows, cols = map_layout(H, W, self.group_size, self.interval, self.grouping, self.fit_groups)
        row_segments, col_segments = axis_segments(H, rows), axis_segments(W, cols)
        table = self.pos_bias(_longest(row_segments), _longest(col_segments)).to(qkv.dtype)
        out = qkv.new_empty([B, H, W, self.num_heads * self.head_dim])
        for row in row_segments:
            for col in col_segments:
                groups = group_view(qkv, row, col)
                target = group_view(out, row, col)
                gh, gw = row[2], col[2]
                q, k, v = self._split_heads(groups.reshape(-1, gh * gw, groups.shape[-1]))
                target.copy_(self._attend_group(q, k, v, table, gh, gw).view(target.shape))
        return out

    def _attend_group(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, gh: int, gw: int) -> Tensor:
        """Attend inside gh x gw groups, in bands of query rows if the position bias is large. Returns [nG, N, C]."""
        band = max(1, self.max_bias // (self.num_heads * gw * gh * gw))  # rows of queries at a time
        if band >= gh:
            return self._attend(q, k, v, expand_bias(table, gh, gw, 0, gh))
        bands: List[Tensor] = []
        for first in range(0, gh, band):
            last = min(first + band, gh)
            bias = expand_bias(table, gh, gw, first, last)
            bands.append(self._attend(q[:, :, first * gw:last * gw], k, v, bias))
        return torch.cat(bands, dim=1)

    def _attend_indexed(self, qkv: Tensor) -> Tensor:
        """Attend with one gather of tokens, a mask on members that do not exist, and one gather back.

        No branch and no loop depends on the size of the map: one exported or compiled graph serves every size.
        """
        B, H, W, C = qkv.shape
        rows, cols = map_layout(H, W, self.group_size, self.interval, self.grouping, self.fit_groups)
        gh, gw = rows[1], cols[1]
        index, real, inverse = group_index(H, W, rows, cols, qkv.device)
        groups = qkv.flatten(1, 2)[:, index.flatten()].reshape(-1, gh * gw, C)  # B * nG, N, C
        q, k, v = self._split_heads(groups)
        table = self.pos_bias(gh, gw).to(qkv.dtype)
        member = torch.arange(gh * gw, device=qkv.device)
        row, col = member // gw, member % gw
        offset = (row[:, None] - row + gh - 1) * (2 * gw - 1) + col[:, None] - col + gw - 1  # N, N
        bias = table.flatten(1)[:, offset.flatten()].reshape(-1, gh * gw, gh * gw)
        x = self._attend(q, k, v, bias, real)
        return x.reshape(B, -1, x.shape[-1])[:, inverse].reshape(B, H, W, -1)

    def _split_heads(self, groups: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Turn [nG, N, 3 * C] into three views [nG, heads, N, head_dim]."""
        q, k, v = groups.unflatten(-1, [3, self.num_heads, self.head_dim]).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, real: Optional[Tensor] = None) -> Tensor:
        """Attend within each group.

        Args:
            q: Queries [B * nG, heads, N, head_dim]; fewer than N if bias has fewer rows.
            k: Keys [B * nG, heads, N, head_dim].
            v: Values, like k.
            bias: Position bias [heads or 1, N, N].
            real: Mask [nG, N] of keys that exist, None if all do.

        Returns:
            Tokens [B * nG, N, C].
        """
        if self.fused_attn and real is None:
            x = F.scaled_dot_product_attention(
                q, k, v,
                attn_mask=bias.unsqueeze(0),
                dropout_p=self.attn_drop.p if self.training else 0.,
            )
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1) + bias
            if real is not None:
                # Far below any score, yet finite in fp16: a group without a real token keeps finite gradients.
                attn = attn.unflatten(0, [-1, real.shape[0]]).masked_fill(~real[:, None, None, :], -3e4).flatten(0, 1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return x.transpose(1, 2).flatten(2)


def _longest(segments: List[Tuple[int, int, int, int, int]]) -> int:
    return max([segment[2] for segment in segments])
