"""The variants, registered with timm. The file's name is the module name in timm's registry."""
import difflib
import inspect
import warnings
from typing import Any, Dict, Optional, cast

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

from .checkpoints.errors import CheckpointError
from .checkpoints.fitting import convert_state_dict, fit
from .checkpoints.hub import explain_failure, fetch_weights, file_to_read
from .checkpoints.parsing import open_checkpoint
from .checkpoints.records import bundled_weights, find, groups_of
from .checkpoints.store import fetch, tag_of
from .model import CrossFormer, CrossFormerFeatures
from .variants import VARIANTS

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


def _cfg_birder(size: int, **kwargs: Any) -> Dict[str, Any]:
    # birder resizes both sides to the input size; mean and std of these weights are in the file itself.
    return _cfg(
        hf_hub_id='birder-project/crossformer_s_arabian-peninsula',
        num_classes=735,
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        crop_pct=1.0,
        crop_mode='squash',
        mean=(0.5191, 0.5306, 0.4877),
        std=(0.2316, 0.2304, 0.2588),
        origin_url='https://gitlab.com/birder/birder',
        license='apache-2.0',
        **kwargs,
    )


def _published(tag: str, **kwargs: Any) -> Dict[str, Any]:
    # Not an address: it names a record of the manifest, whose weights `_create_crossformer` hands to timm as a file.
    make = _cfg_pp if tag.startswith('crossformer_pp_') else _cfg
    return make(url=f'timm-crossformer:{tag}', **kwargs)


_CLASSIFIERS = [f'crossformer_{name}.in1k' for name in (
    'tiny', 'small', 'base', 'large', 'pp_small', 'pp_base', 'pp_large', 'pp_huge')]
_BACKBONES = [f'crossformer_{size}.{name}' for name, sizes in {
    'retinanet_coco': ('small', 'base'),
    'mask_rcnn_coco': ('small', 'base'),
    'semantic_fpn_ade20k': ('small', 'base', 'large'),
    'upernet_ade20k': ('small', 'base', 'large'),
}.items() for size in sizes]

default_cfgs = generate_default_cfgs({
    **{tag: _published(tag) for tag in _CLASSIFIERS},
    **{tag: _published(tag, num_classes=0) for tag in _BACKBONES},
    'crossformer_small.birder_arabian_peninsula_256': _cfg_birder(
        256, hf_hub_filename='crossformer_s_arabian-peninsula256px.pt'),
    'crossformer_small.birder_arabian_peninsula_384': _cfg_birder(
        384, hf_hub_filename='crossformer_s_arabian-peninsula.pt'),
    'crossformer_lucidrains.untrained': _cfg(origin_url='https://github.com/lucidrains/vit-pytorch'),
    'test_crossformer.untrained': _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    **{tag: _cfg(file=file, **cfg) for tag, file, cfg in bundled_weights()},
})


def _create_crossformer(
        variant: str,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> CrossFormer:
    tag = pretrained_cfg if isinstance(pretrained_cfg, str) else getattr(pretrained_cfg, 'tag', None)
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict() if pretrained else {}
    published = tag_of(cfg)
    tag_args = groups_of(f'{variant}.{tag}')
    _check_arguments(variant, kwargs)
    if published:
        if find(published).dense and not kwargs.get('features_only'):
            raise CheckpointError(
                f'{published} is the backbone of a detector or segmenter, without final norm and classifier. Create it '
                f'with `features_only=True`, or take {variant}.in1k.')
        fetched = fetch(published, cache_dir=kwargs.get('cache_dir'))
        cfg['file'] = fetched.weights
        pretrained_cfg_overlay = dict(pretrained_cfg_overlay or {}, file=fetched.weights)
        if fetched.conversion and fetched.conversion.groups_from == 'checkpoint':  # it knows better
            tag_args = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in fetched.conversion.args.items() if name in ('group_size', 'interval')}
    tag_args = {name: value for name, value in tag_args.items() if name not in kwargs}
    kwargs = {**VARIANTS[variant], **tag_args, **kwargs}
    depths = kwargs['depths']
    stages = len(depths) if isinstance(depths, (list, tuple)) else 0  # the model refuses anything else
    out_indices = kwargs.pop('out_indices', tuple(range(stages)))
    path = file_to_read(cfg, fetch_weights(cfg, kwargs.get('cache_dir')))
    parsed = open_checkpoint(path) if path else None  # timm's reader takes fewer files than ours
    if parsed:
        pretrained_cfg_overlay = dict(pretrained_cfg_overlay or {}, state_dict=parsed.state_dict)

    def fitted(state_dict: Dict[str, Any], model: CrossFormer) -> Dict[str, Any]:
        return fit(parsed, model) if parsed else convert_state_dict(state_dict, model)

    with explain_failure(cfg):
        model = build_model_with_cfg(
            CrossFormer,
            variant,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            pretrained_filter_fn=fitted,
            feature_cfg=dict(feature_cls=CrossFormerFeatures, flatten_sequential=True, out_indices=out_indices),
            **kwargs,
        )
    if parsed:
        cast(Dict[str, Any], model.pretrained_cfg).pop('state_dict')
    if tag_args:
        model._model_args = tag_args  # timm records what the caller gave; an export needs these as well
    return model


def _check_arguments(variant: str, kwargs: Dict[str, Any]) -> None:
    known = set(inspect.signature(CrossFormer).parameters) | set(inspect.signature(build_model_with_cfg).parameters)
    known |= {'features_only', 'feature_cls', 'out_indices', 'pruned'}
    unknown = sorted(set(kwargs) - known)
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.75)
        hint = f'Did you mean `{close[0]}`?' if close else 'See `help(timm_crossformer.CrossFormer)`.'
        raise TypeError(f'{variant} has no argument {", ".join(f"`{name}`" for name in unknown)}. {hint}')


def _register(fn):
    """Register an entrypoint with timm unless the name is taken: timm would only warn, and forget the older model."""
    if timm.is_model(fn.__name__) and timm.model_entrypoint(fn.__name__).__module__ != fn.__module__:
        owner = timm.model_entrypoint(fn.__name__).__module__
        raise ImportError(
            f'timm already has a model `{fn.__name__}`, from {owner}. '
            'Import only one of the two packages, or upgrade timm_crossformer.')
    with warnings.catch_warnings():  # timm warns if this package is imported a second time in one process
        warnings.simplefilter('ignore', UserWarning)
        return register_model(fn)


@_register
def crossformer_tiny(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-T: 27.8 M parameters, 2.9 GMACs at 224."""
    return _create_crossformer('crossformer_tiny', pretrained, **kwargs)


@_register
def crossformer_small(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-S: 30.7 M parameters, 4.9 GMACs at 224."""
    return _create_crossformer('crossformer_small', pretrained, **kwargs)


@_register
def crossformer_base(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-B: 52.0 M parameters, 9.2 GMACs at 224."""
    return _create_crossformer('crossformer_base', pretrained, **kwargs)


@_register
def crossformer_large(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer-L: 92.0 M parameters, 16.1 GMACs at 224."""
    return _create_crossformer('crossformer_large', pretrained, **kwargs)


@_register
def crossformer_pp_small(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-S: 23.3 M parameters, 4.4 GMACs at 224."""
    return _create_crossformer('crossformer_pp_small', pretrained, **kwargs)


@_register
def crossformer_pp_base(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-B: 52.0 M parameters, 9.5 GMACs at 224."""
    return _create_crossformer('crossformer_pp_base', pretrained, **kwargs)


@_register
def crossformer_pp_large(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-L: 92.0 M parameters, 16.6 GMACs at 224."""
    return _create_crossformer('crossformer_pp_large', pretrained, **kwargs)


@_register
def crossformer_pp_huge(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """CrossFormer++-H: 96.0 M parameters, 21.6 GMACs at 224."""
    return _create_crossformer('crossformer_pp_huge', pretrained, **kwargs)


@_register
def crossformer_lucidrains(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """vit-pytorch's CrossFormer with its defaults: 28.8 M parameters. Its depths of pairs are twice as many blocks."""
    return _create_crossformer('crossformer_lucidrains', pretrained, **kwargs)


@_register
def test_crossformer(pretrained: bool = False, **kwargs: Any) -> CrossFormer:
    """A CrossFormer of under 1 M parameters for tests and demos, meant for 32 to 160 pixels."""
    return _create_crossformer('test_crossformer', pretrained, **kwargs)
