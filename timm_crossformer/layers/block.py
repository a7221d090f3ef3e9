"""The transformer block: attention inside groups and an MLP, each with a residual."""
from functools import partial
from typing import Callable, List, Optional, Type

import torch
import torch.nn.functional as F
from timm.layers import GELU, DropPath, LayerNorm, RmsNorm
from torch import Tensor, nn

from .attention import GroupAttention, attend_run, attend_runs, chunks
from .cooling import AmplitudeCooling
from .cpu import (
    Mlp,
    add_branch,
    chunk_length,
    consists_of,
    in_inference_graph,
    is_made_of,
    is_plain,
    linear,
    product,
    tokens_per_chunk,
)
from .grouping import Segment, from_groups, list_runs, longest, map_segments, to_groups
from .operator import operator
from .position_bias import DynamicPosBias, remembered_table

# What treats every token of a map by itself, and in evaluation alike.
_TOKENWISE = (
    nn.LayerNorm, nn.RMSNorm, LayerNorm, RmsNorm, Mlp, nn.Linear, nn.GELU, nn.ReLU, nn.SiLU, GELU, nn.Identity,
    nn.Dropout, DropPath,
)


class CrossFormerBlock(nn.Module):
    """Attention inside groups and an MLP, each with a residual; in ++ some blocks end with amplitude cooling."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            head_dim: Optional[int] = None,
            pos_bias: str = 'paper',
            cooling: bool = False,
            mlp_ratio: float = 4.,
            qkv_bias: bool = True,
            proj_drop: float = 0.,
            attn_drop: float = 0.,
            drop_path: float = 0.,
            norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
            act_layer: Type[nn.Module] = nn.GELU,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Channels of a token.
            cooling: End the block with an amplitude cooling layer.
            drop_path: Rate of stochastic depth for both residuals.
            (others): See `GroupAttention` and `CrossFormer`.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = GroupAttention(
            dim,
            num_heads=num_heads,
            head_dim=head_dim,
            pos_bias=pos_bias,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **dd,
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.cooling = AmplitudeCooling(dim, norm_layer, **dd) if cooling else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens [B, H, W, C]."""
        if torch.jit.is_scripting():
            x = x + self.drop_path1(self.attn(self.norm1(x)))
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        elif self._is_one_operator(x):
            x = self._in_graph(x)
        else:
            x = self._add_branches(x)
        return self.cooling(x)

    @torch.jit.unused
    def _add_branches(self, x: Tensor) -> Tensor:
        parts = [self.norm1, self.attn, self.drop_path1, self.norm2, self.mlp, self.drop_path2]
        length = chunk_length(x, parts)
        if length > 0 and self._is_tokenwise():
            return self._add_in_chunks(x, length)
        x = add_branch(x, self.norm1, self.attn, self.drop_path1)
        return add_branch(x, self.norm2, self.mlp, self.drop_path2)

    @torch.jit.unused
    def _is_tokenwise(self) -> bool:
        """Return whether chunks, which see part of a map or are left out in evaluation, make no difference."""
        attn = self.attn
        return is_plain(attn, GroupAttention) and all(consists_of(part, _TOKENWISE) for part in (
            self.norm1, attn.attn_drop, attn.proj_drop, self.drop_path1, self.norm2, self.mlp, self.drop_path2))

    @torch.jit.unused
    def _add_in_chunks(self, x: Tensor, length: int) -> Tensor:
        attn, (H, W) = self.attn, x.shape[1:3]
        rows, cols = map_segments(H, W, attn.group_size, attn.interval, attn.grouping, attn.fit_groups)
        return _add_by_groups(
            x,
            rows,
            cols,
            attn.pos_bias(longest(rows), longest(cols)),
            attn.num_heads,
            attn.fused_attn,
            norm=self.norm1,
            qkv=partial(linear, attn.qkv),
            proj=partial(linear, attn.proj),
            mlp=lambda tokens: self.mlp(self.norm2(tokens)),
            length=length,
        )

    @torch.jit.unused
    def _is_one_operator(self, x: Tensor) -> bool:
        """Return whether, in a compiled graph, the block is exactly what the operator computes."""
        if not in_inference_graph(x) or not _is_known(self):
            return False
        # Whatever neither this method nor the operator's arguments touch may change unseen once the graph is there.
        mlp = self.mlp
        if type(mlp.act) is not nn.GELU or mlp.act.approximate != 'none' or type(mlp.norm) is not nn.Identity:
            return False
        drops = self.attn.attn_drop, self.attn.proj_drop, mlp.drop1, mlp.drop2
        return not any(part.training for part in (self, *drops, self.drop_path1, self.drop_path2))

    @torch.jit.unused
    def _in_graph(self, x: Tensor) -> Tensor:
        layers = self.norm1, self.attn.qkv, self.attn.proj, self.norm2, self.mlp.fc1, self.mlp.fc2
        return _block(
            x,
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            [self.norm1.eps, self.norm2.eps],
            *self.attn.config(),
        )


def _add_by_groups(
        x: Tensor,
        rows: List[Segment],
        cols: List[Segment],
        table: Tensor,
        num_heads: int,
        fused: bool,
        norm: Callable[[Tensor], Tensor],
        qkv: Callable[[Tensor], Tensor],
        proj: Callable[[Tensor], Tensor],
        mlp: Callable[[Tensor], Tensor],
        length: int,
) -> Tensor:
    """Add attention to tokens, then an MLP of the sum, for inference.

    In parts, two results are as large as the map, not five, and a part is still in the cache when the MLP gets it; at
    2048 px the map has 100 MB in the first stage.

    Args:
        x: Tokens [B, H, W, C].
        rows: Segments of the H axis.
        cols: Segments of the W axis.
        table: Position biases; see `attend_runs`.
        num_heads: Heads.
        fused: Use `scaled_dot_product_attention`.
        norm: Applied to tokens before attention.
        qkv: Turns them into queries, keys and values.
        proj: Applied after attention.
        mlp: MLP, its norm included.
        length: About how many tokens to take at a time; 0 for all of them.
    """
    tokens = to_groups(x, rows, cols)
    if tokens.data_ptr() == x.data_ptr():
        tokens = tokens.clone()
    runs = list_runs(x.shape[0], rows, cols)
    if length == 0:
        tokens += proj(attend_runs(qkv(norm(tokens)), runs, table, num_heads, 0., fused))
        tokens += mlp(tokens)
    else:
        for place, run, bias in chunks(tokens, runs, table, num_heads, length):
            part = tokens[place]
            part += proj(attend_run(qkv(norm(part)), run, table, bias, num_heads, 0., fused))
            for few in part.split(length):  # one group may have more tokens
                few += mlp(few)
    return from_groups(tokens, list(x.shape), rows, cols)


@torch.compiler.assume_constant_result  # as torch.compile has it for hooks; to look at all that takes many guards
def _is_known(block: CrossFormerBlock) -> bool:
    """Return whether nothing but the weights tells the attention and the MLP of a block from those of others."""
    attn, mlp, norms = block.attn, block.mlp, (block.norm1, block.norm2)
    kinds = (
        GroupAttention, DynamicPosBias, Mlp, nn.LayerNorm, nn.Linear, nn.GELU, nn.ReLU, nn.Dropout, nn.Identity,
        nn.Sequential, DropPath,
    )
    return (
        type(attn) is GroupAttention and type(mlp) is Mlp and attn.pos_bias.plain_parameters() is not None
        and all(is_made_of(part, kinds) for part in (attn, mlp, *norms, block.drop_path1, block.drop_path2))
        and all(type(layer) is nn.Linear for layer in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
        and all(type(norm) is nn.LayerNorm and norm.weight is not None for norm in norms)
    )


# Left to itself, torch.compile calls PyTorch's products on whole maps and carries residuals along unsummed.
@operator('block', lambda x, *_: x.new_empty(x.shape))
def _block(
        x: Tensor,
        weights: List[Tensor],
        biases: List[Optional[Tensor]],
        eps: List[float],
        bias_mlp: List[Tensor],
        bias_eps: List[float],
        num_heads: int,
        group_size: List[int],
        interval: int,
        grouping: str,
        fit_groups: bool,
        legacy_lookup: bool,
        fused: bool,
) -> Tensor:
    """Compute a block for inference in fp32 on a CPU, as eager mode does.

    Args:
        x: Tokens [B, H, W, C].
        weights: Of the first norm, of queries, keys and values, of the projection, of the second norm and of the MLP.
        biases: Of the same.
        eps: Of both norms.
        (others): See `GroupAttention.config`.
    """
    norm1, qkv, proj, norm2, fc1, fc2 = zip(weights, biases, strict=True)
    C = x.shape[3:]
    rows, cols = map_segments(x.shape[1], x.shape[2], (group_size[0], group_size[1]), interval, grouping, fit_groups)
    table = remembered_table(
        bias_mlp, bias_eps, longest(rows), longest(cols), group_size if legacy_lookup else None)
    return _add_by_groups(
        x,
        rows,
        cols,
        table,
        num_heads,
        fused,
        norm=lambda tokens: F.layer_norm(tokens, C, *norm1, eps[0]),
        qkv=lambda tokens: product(tokens, *qkv),
        proj=lambda tokens: product(tokens, *proj),
        mlp=lambda tokens: product(product(F.layer_norm(tokens, C, *norm2, eps[1]), *fc1, True), *fc2),
        length=tokens_per_chunk(x),
    )
