"""What the variants are, as data."""
from typing import Any, Dict

__all__ = ['VARIANTS']

_PP_ARGS: Dict[str, Any] = dict(group_size=(4, 4, 14, 7), interval=(4, 2, 1, 1), lda_grouping='region', cooling=True)

# What differs from the defaults of `CrossFormer`, by variant.
VARIANTS: Dict[str, Dict[str, Any]] = {
    'crossformer_tiny': dict(embed_dim=64, depths=(1, 1, 8, 6), num_heads=(2, 4, 8, 16)),
    'crossformer_small': dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    'crossformer_base': dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    'crossformer_large': dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'crossformer_pp_small': dict(_PP_ARGS, embed_dim=64, depths=(2, 2, 18, 2), num_heads=(2, 4, 8, 16)),
    'crossformer_pp_base': dict(_PP_ARGS, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    'crossformer_pp_large': dict(_PP_ARGS, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    'crossformer_pp_huge': dict(_PP_ARGS, embed_dim=128, depths=(6, 6, 18, 2), num_heads=(4, 8, 16, 32)),
    'crossformer_lucidrains': dict(
        embed_dim=(64, 128, 256, 512), depths=(4, 4, 16, 4), num_heads=(2, 4, 8, 16), lda_group_size=(8, 4, 2, 1),
        lda_grouping='grid', pos_bias='lucidrains', stage_norm=False, qkv_bias=False,
    ),
    'test_crossformer': dict(
        embed_dim=(32, 48, 64, 96), depths=(2, 2, 4, 2), num_heads=(1, 2, 2, 3), group_size=4, interval=(4, 2, 1, 1),
    ),
}
