"""The transformer block: attention inside groups and an MLP, each with a residual."""
from typing import Callable, Optional, Type

from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from .attention import GroupAttention
from .cooling import AmplitudeCooling


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
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return self.cooling(x)
