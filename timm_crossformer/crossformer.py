"""The variants, registered with timm. The file's name is the module name in timm's registry."""
import difflib
import inspect
from typing import Any, Dict

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .convert import convert_state_dict
from .model import CrossFormer

__all__ = ['CrossFormer']


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': ('stem.convs.0', 'stem.convs.1', 'stem.convs.2', 'stem.convs.3'),
        'classifier': 'head.fc',
        'paper_ids': 'arXiv:2108.00154',
        'paper_name': 'CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention',
        'origin_url': 'https://github.com/cheerss/CrossFormer',
        'license': 'mit',
        **kwargs,
    }


def _cfg_pp(**kwargs: Any) -> Dict[str, Any]:
    return _cfg(
        paper_ids='arXiv:2303.06908',
        paper_name='CrossFormer++: A Versatile Vision Transformer Hinging on Cross-scale Attention',
        **kwargs,
    )


default_cfgs = generate_default_cfgs({
    'crossformer_tiny.in1k': _cfg(),
    'crossformer_small.in1k': _cfg(),
    'crossformer_base.in1k': _cfg(),
    'crossformer_large.in1k': _cfg(),
    'crossformer_pp_small.in1k': _cfg_pp(),
    'crossformer_pp_base.in1k': _cfg_pp(),
    'crossformer_pp_large.in1k': _cfg_pp(),
    'crossformer_pp_huge.in1k': _cfg_pp(),
    'crossformer_lucidrains.untrained': _cfg(origin_url='https://github.com/lucidrains/vit-pytorch'),
    'test_crossformer.untrained': _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
})

_PP_ARGS = dict(group_size=(4, 4, 14, 7), interval=(4, 2, 1, 1), lda_grouping='region', cooling=True)


def _create_crossformer(variant: str, pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    _check_arguments(variant, kwargs)
    out_indices = kwargs.pop('out_indices', tuple(range(len(kwargs.get('depths', (2, 2, 6, 2))))))
    return build_model_with_cfg(
        CrossFormer,
        variant,
        pretrained,
        pretrained_filter_fn=convert_state_dict,
        feature_cfg=dict(flatten_sequential=True, out_indices=out_indices),
        **kwargs,
    )


def _check_arguments(variant: str, kwargs: Dict[str, Any]) -> None:
    known = set(inspect.signature(CrossFormer).parameters) | set(inspect.signature(build_model_with_cfg).parameters)
    known |= {'features_only', 'feature_cls', 'out_indices', 'pruned'}
    unknown = sorted(set(kwargs) - known)
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f'Did you mean `{close[0]}`?' if close else 'See `help(timm_crossformer.CrossFormer)`.'
        raise TypeError(f'{variant} has no argument {", ".join(f"`{name}`" for name in unknown)}. {hint}')


def _register(fn):
    """Register an entrypoint with timm unless the name is taken: timm would only warn, and forget the older model."""
    if timm.is_model(fn.__name__) and timm.model_entrypoint(fn.__name__).__module__ != fn.__module__:
        owner = timm.model_entrypoint(fn.__name__).__module__
        raise ImportError(
            f'timm already has a model `{fn.__name__}`, from {owner}. '
            'Import only one of the two packages, or upgrade timm_crossformer.')
    return register_model(fn)


@_register
def crossformer_tiny(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-T: 27.8 M parameters, 2.9 GMACs at 224."""
    args = dict(embed_dim=64, depths=(1, 1, 8, 6), num_heads=(2, 4, 8, 16))
    return _create_crossformer('crossformer_tiny', pretrained, **dict(args, **kwargs))


@_register
def crossformer_small(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-S: 30.7 M parameters, 4.9 GMACs at 224."""
    args = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
    return _create_crossformer('crossformer_small', pretrained, **dict(args, **kwargs))


@_register
def crossformer_base(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-B: 52.0 M parameters, 9.2 GMACs at 224."""
    args = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
    return _create_crossformer('crossformer_base', pretrained, **dict(args, **kwargs))


@_register
def crossformer_large(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-L: 92.0 M parameters, 16.1 GMACs at 224."""
    args = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    return _create_crossformer('crossformer_large', pretrained, **dict(args, **kwargs))


@_register
def crossformer_pp_small(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-S: 23.3 M parameters, 4.4 GMACs at 224."""
    args = dict(_PP_ARGS, embed_dim=64, depths=(2, 2, 18, 2), num_heads=(2, 4, 8, 16))
    return _create_crossformer('crossformer_pp_small', pretrained, **dict(args, **kwargs))


@_register
def crossformer_pp_base(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-B: 52.0 M parameters, 9.5 GMACs at 224."""
    args = dict(_PP_ARGS, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
    return _create_crossformer('crossformer_pp_base', pretrained, **dict(args, **kwargs))


@_register
def crossformer_pp_large(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-L: 92.0 M parameters, 16.6 GMACs at 224."""
    args = dict(_PP_ARGS, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    return _create_crossformer('crossformer_pp_large', pretrained, **dict(args, **kwargs))


@_register
def crossformer_pp_huge(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-H: 96.0 M parameters, 21.6 GMACs at 224."""
    args = dict(_PP_ARGS, embed_dim=128, depths=(6, 6, 18, 2), num_heads=(4, 8, 16, 32))
    return _create_crossformer('crossformer_pp_huge', pretrained, **dict(args, **kwargs))


@_register
def crossformer_lucidrains(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """vit-pytorch's CrossFormer with its defaults: 28.8 M parameters. Its depths of pairs are twice as many blocks."""
    args = dict(
        embed_dim=(64, 128, 256, 512), depths=(4, 4, 16, 4), num_heads=(2, 4, 8, 16), lda_group_size=(8, 4, 2, 1),
        lda_grouping='grid', pos_bias='lucidrains', stage_norm=False, qkv_bias=False,
    )
    return _create_crossformer('crossformer_lucidrains', pretrained, **dict(args, **kwargs))


@_register
def test_crossformer(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """A CrossFormer of under 1 M parameters for tests and demos, meant for 32 to 160 pixels."""
    args = dict(embed_dim=(32, 48, 64, 96), depths=(2, 2, 4, 2), num_heads=(1, 2, 2, 3), group_size=4, interval=(4, 2, 1, 1))
    return _create_crossformer('test_crossformer', pretrained, **dict(args, **kwargs))
