"""What shapes tell of a network: its arguments, and the variant it is of."""
import re
from contextlib import suppress
from functools import lru_cache
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence

from torch import Tensor, nn

from ..variants import VARIANTS
from .errors import CheckpointError
from .names import canonical

__all__ = ['architecture_of', 'hint', 'infer_arguments', 'known_variants', 'listed', 'name_of', 'own_shapes']

_SHOWN = 20  # keys an error lists before it only counts


def infer_arguments(state_dict: Mapping[str, Tensor]) -> Dict[str, Any]:
    """Infer constructor arguments from the shapes of a state dict with our names.

    Raises:
        CheckpointError: A tensor is missing from which an argument would be read, or has the wrong number of
            dimensions.
    """
    def shape(key: str, ndim: int = 2) -> Sequence[int]:
        tensor = state_dict.get(key)
        if tensor is None or tensor.ndim != ndim:
            got = 'is missing' if tensor is None else f'has shape {tuple(tensor.shape)}'
            raise CheckpointError(
                f'The checkpoint needs `{key}` with {ndim} dimensions, but it {got}. It is incomplete: fetch it again.')
        return tensor.shape

    depths: List[int] = []
    for name in state_dict:
        match = re.match(r'stages\.(\d{1,2})\.blocks\.(\d{1,3})\.', name)
        if match:
            stage = int(match[1])
            depths.extend([0] * (stage + 1 - len(depths)))
            depths[stage] = max(depths[stage], int(match[2]) + 1)
    dims, heads, head_dims, ratios = [], [], [], []
    pos_bias = 'paper'
    for stage in range(len(depths)):
        block = f'stages.{stage}.blocks.0'
        dim = shape(f'{block}.norm1.weight', 1)[0]
        inner = shape(f'{block}.attn.qkv.weight')[0] // 3
        bias_heads, bias_dim = shape(f'{block}.attn.pos_bias.mlp.9.weight')
        if bias_heads == 1 and bias_dim == dim // 4:
            pos_bias, bias_heads = 'lucidrains', max(inner // 32, 1)
        dims.append(dim)
        heads.append(bias_heads)
        head_dims.append(inner // max(bias_heads, 1))
        ratios.append(shape(f'{block}.mlp.fc1.weight')[0] / max(dim, 1))
    if not dims:
        raise CheckpointError('The checkpoint has no blocks. Use a checkpoint of a CrossFormer.')
    own_head_dims = [dim // max(head, 1) for dim, head in zip(dims, heads, strict=True)]
    if head_dims != own_head_dims and len(set(head_dims)) > 1:
        raise CheckpointError(f'All stages need heads of one size, got {head_dims} channels. Check the checkpoint.')
    return dict(
        in_chans=shape('stem.convs.0.weight', 4)[1],
        num_classes=state_dict['head.fc.weight'].shape[0] if 'head.fc.weight' in state_dict else 0,
        embed_dim=tuple(dims),
        depths=tuple(depths),
        num_heads=tuple(heads),
        head_dim=None if head_dims == own_head_dims else head_dims[0],
        cooling=any('.cooling.' in key for key in state_dict),
        pos_bias=pos_bias,
        stage_norm='stem.norm.weight' in state_dict,
        mlp_ratio=ratios[0] if len(set(ratios)) == 1 else tuple(ratios),
        qkv_bias='stages.0.blocks.0.attn.qkv.bias' in state_dict,
    )


@lru_cache(maxsize=1)
def known_variants() -> Dict[str, Dict[str, Any]]:
    """Return the arguments of every variant, in the form `infer_arguments` gives those of a checkpoint."""
    known = {}
    for name, given in VARIANTS.items():
        args = dict(
            head_dim=None, cooling=False, pos_bias='paper', stage_norm=True, mlp_ratio=4., qkv_bias=True, **{
                key: value for key, value in given.items() if key in ('embed_dim', 'depths', 'num_heads')
            })
        args.update({key: value for key, value in given.items() if key in args})
        if isinstance(args['embed_dim'], int):
            args['embed_dim'] = tuple(args['embed_dim'] * 2 ** i for i in range(len(args['depths'])))
        known[name] = args
    return known


def architecture_of(args: Mapping[str, Any]) -> Dict[str, Any]:
    """Return what makes a variant: all arguments but the numbers of channels and classes."""
    return {key: value for key, value in args.items() if key not in ('in_chans', 'num_classes')}


def own_shapes(model: nn.Module) -> Dict[str, Tensor]:
    """Return the weights of a model or pyramid by our names."""
    return {canonical(key): tensor for key, tensor in model.state_dict(keep_vars=True).items()}


def own_architecture(model: Optional[nn.Module]) -> Optional[Dict[str, Any]]:
    """Return what makes the variant of a model, None if it has no such weights."""
    if model is not None:
        with suppress(CheckpointError):
            return architecture_of(infer_arguments(own_shapes(model)))
    return None


def hint(state_dict: Mapping[str, Tensor], model: Optional[nn.Module]) -> str:
    """Name the variant that weights fit, if it is another one than the model; '' if they are of the model's shape."""
    try:
        args = infer_arguments(state_dict)
    except CheckpointError:
        return ' Fetch the checkpoint again, or use one of another origin.'
    fitting = [variant for variant, known in known_variants().items() if known == architecture_of(args)]
    own = own_architecture(model)
    if architecture_of(args) == own or (model is None and fitting):
        return ''
    if fitting:
        acl = args['cooling'] and not name_of(model).startswith('crossformer_pp_')
        reason = 'It holds amplitude cooling layers (ACL)' if acl else 'It is of another variant'
        return f' {reason}: try {" or ".join(fitting)}.'
    shown = [key for key in own if args[key] != own[key]] if own else ['embed_dim', 'depths', 'num_heads']
    told = ', '.join(f'{key}={args[key]}' for key in shown)
    return f' It fits no variant: {told}. Create the model with these arguments, or fetch the checkpoint again.'


def name_of(model: Optional[nn.Module]) -> str:
    """Return what messages call a model."""
    if model is None:
        return 'CrossFormer'
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__


def listed(keys: Iterable[Any]) -> str:
    """List keys in order, the first of many."""
    ordered = sorted(map(str, keys))
    more = f' and {len(ordered) - _SHOWN} more' if len(ordered) > _SHOWN else ''
    return ', '.join(key[:200] for key in ordered[:_SHOWN]) + more
