"""Read CrossFormer checkpoints of every origin, safely, and bring their keys into the form of `CrossFormer`.

The only file that knows foreign key names. Whatever loads weights passes through `parse_state_dict` and `check_fit`;
the model's own `load_state_dict` and timm's `pretrained=True` call both as `convert_state_dict`.
"""
import math
import re
import warnings
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch
from torch import Tensor, nn

from ..config import per_stage, resolve_group_size
from ..variants import VARIANTS
from .reading import CheckpointError, Foreign, is_packed, read_file

__all__ = ['Checkpoint', 'CheckpointError', 'convert_state_dict', 'parse_state_dict', 'read_checkpoint']

_SHOWN = 20  # keys an error lists before it only counts
_COUNTER = 'n_averaged'  # torch.optim.swa_utils.AveragedModel keeps it beside the weights
_MAX_KEYS = 100_000  # of a checkpoint; the largest CrossFormer in a detector with optimizer has a few thousand

# Where containers keep weights, the preferred first. As in timm, an exponential moving average wins; but where mmengine
# writes `ema_state_dict`, it has put the average into `state_dict`.
CONTAINER_KEYS = ('state_dict_ema', 'model_ema', 'state_dict', 'model', 'state', 'module', 'ema_state_dict', 'ema')


class InertConfig:
    """Stands in for yacs' config node, which official checkpoints hold, so that no foreign code is imported or run."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


def safe_globals() -> ContextManager:
    """Let `torch.load(..., weights_only=True)` read official checkpoints with their config inside, for as long."""
    return torch.serialization.safe_globals([(InertConfig, 'yacs.config.CfgNode')])


# Rules: pattern of a key without its last part (weight, bias, ...), what it becomes; None drops the key.
Rule = Tuple[str, Union[str, Callable[[re.Match], str], None]]

_POS_PROJ = {'pos_proj': 0, 'pos1.0': 1, 'pos1.2': 3, 'pos2.0': 4, 'pos2.2': 6, 'pos3.0': 7, 'pos3.2': 9}
_POSITION_TABLES = r'attn\.(?:biases|relative_position_index)|attn_mask'


def _previous_stage(match: re.Match) -> str:
    """Official downsampling ends a stage, ours begins the next one."""
    part = {'reductions': 'convs'}.get(match[2], match[2])
    return f'stages.{int(match[1]) + 1}.downsample.{part}{match[3] or ""}'


def _from_one(match: re.Match) -> str:
    """Birder counts stages from one."""
    return f'stages.{int(match[1]) - 1}.{match[2].replace("reductions", "convs")}'


def _pair(match: re.Match) -> str:
    """vit-pytorch's layer is short attention, MLP, long attention, MLP: two blocks."""
    stage, layer, part, name = match[1], int(match[2]), int(match[3]), match[4]
    if part % 2 == 0:
        names = {'norm': 'norm1', 'to_qkv': 'attn.qkv', 'to_out': 'attn.proj'}
        name = names.get(name) or name.replace('dpb', 'attn.pos_bias.mlp')
    else:
        name = {'0': 'norm2', '1': 'mlp.fc1', '4': 'mlp.fc2'}[name]
    return f'stages.{stage}.blocks.{2 * layer + part // 2}.{name}'


_BLOCK_PARTS = r'norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2'
_RULES: Dict[str, List[Rule]] = {
    'native': [],  # names stay, but for those of a pyramid; the model knows which it has
    'official': [
        (r'patch_embed\.projs\.(\d+)', r'stem.convs.\1'),
        (r'patch_embed\.norm', r'stem.norm'),
        (r'layers\.(\d+)\.downsample\.(reductions|norm)(\.\d+)?', _previous_stage),
        (rf'layers\.(\d+\.blocks\.\d+\.(?:{_BLOCK_PARTS}))', r'stages.\1'),
        (
            rf'layers\.(\d+\.blocks\.\d+)\.attn\.pos\.({"|".join(map(re.escape, _POS_PROJ))})',
            lambda m: f'stages.{m[1]}.attn.pos_bias.mlp.{_POS_PROJ[m[2]]}',
        ),
        (r'layers\.(\d+\.blocks\.\d+)\.ex_conv', r'stages.\1.cooling.conv'),
        (r'layers\.(\d+\.blocks\.\d+)\.ex_ln', r'stages.\1.cooling.norm'),
        (rf'layers\.\d+\.blocks\.\d+\.(?:{_POSITION_TABLES})', None),
        (r'norm', r'norm'),
        (r'head', r'head.fc'),
    ],
    'birder': [
        (r'patch_embed\.projs\.(\d+)', r'stem.convs.\1'),
        (r'patch_embed\.norm', r'stem.norm'),
        (r'body\.stage([1-9]\d*)\.(downsample\.(?:norm|reductions\.\d+))', _from_one),
        (r'body\.stage([1-9]\d*)\.(blocks\.\d+\.(?:norm1|norm2|attn\.qkv|attn\.proj))', _from_one),
        (r'body\.stage([1-9]\d*)\.(blocks\.\d+)\.mlp\.0', lambda m: f'{_from_one(m)}.mlp.fc1'),
        (r'body\.stage([1-9]\d*)\.(blocks\.\d+)\.mlp\.3', lambda m: f'{_from_one(m)}.mlp.fc2'),
        (
            r'body\.stage([1-9]\d*)\.(blocks\.\d+)\.attn\.pos\.pos\.(\d+)',
            lambda m: f'{_from_one(m)}.attn.pos_bias.mlp.{m[3]}',
        ),
        (rf'body\.stage[1-9]\d*\.blocks\.\d+\.(?:{_POSITION_TABLES})', None),
        (r'features\.0', r'norm'),
        (r'classifier', r'head.fc'),
    ],
    'vit-pytorch': [
        (r'layers\.0\.0\.convs\.(\d+)', r'stem.convs.\1'),
        (r'layers\.([1-9]\d*)\.0\.convs\.(\d+)', r'stages.\1.downsample.convs.\2'),
        (r'layers\.(\d+)\.1\.layers\.(\d+)\.([02])\.(norm|to_qkv|to_out|dpb\.\d+)', _pair),
        (r'layers\.(\d+)\.1\.layers\.(\d+)\.([13])\.([014])', _pair),
        (r'layers\.\d+\.1\.layers\.\d+\.[02]\.rel_pos_indices', None),
        (r'to_logits\.1', r'head.fc'),
    ],
}
_LAST_PARTS = {'weight': 'weight', 'bias': 'bias', 'g': 'weight', 'b': 'bias'}
_ANCHORS = {  # one key of each origin that nothing else has
    'native': 'stem.convs.0.weight',
    'official': 'layers.0.blocks.0.norm1.weight',
    'birder': 'body.stage1.blocks.0.norm1.weight',
    'vit-pytorch': 'layers.0.0.convs.0.weight',
}


@dataclass
class Checkpoint:
    """Weights in the form of `CrossFormer`, and what was found out about them.

    Attributes:
        state_dict: Tensors by our names; dtype and values are those of the source.
        origin: 'native', 'official', 'birder' or 'vit-pytorch'.
        source_keys: Name in the source by our name.
        prefix: What stood before every source key, as 'module.' or 'backbone.'.
        left_out: Source keys that belong to other parts of a detector or segmenter.
        container: Key of the weights inside the file, '' if the file is a plain state dict.
        group_size: G as birder's position tables show it, (height, width); None elsewhere.
        groups: `group_size` and `interval` as a detector's or segmenter's config in the file gives them.
        pretrained_cfg: What the file says about its input, as entries of timm's pretrained cfg (birder).
        label_names: Names of the classes, if the file has them (birder).
    """

    state_dict: 'OrderedDict[str, Tensor]'
    origin: str
    source_keys: Dict[str, str] = field(default_factory=dict)
    prefix: str = ''
    left_out: List[str] = field(default_factory=list)
    container: str = ''
    group_size: Optional[Tuple[int, int]] = None
    groups: Dict[str, Tuple[int, ...]] = field(default_factory=dict)
    pretrained_cfg: Dict[str, Any] = field(default_factory=dict)
    label_names: Optional[List[str]] = None

    @property
    def dense(self) -> bool:
        """True for a backbone of a detector or segmenter: no final norm, no classifier."""
        return 'head.fc.weight' not in self.state_dict and (
            'norm.weight' not in self.state_dict and 'stem.norm.weight' in self.state_dict)

    def arguments(self) -> Dict[str, Any]:
        """Infer constructor arguments from shapes. See `infer_arguments`."""
        return infer_arguments(self.state_dict)

    def trained_groups(self, stages: int) -> Dict[str, Any]:
        """Return the arguments for groups that the file itself names, of which no shape of a weight tells."""
        groups: Dict[str, Any] = {}
        if self.group_size is not None:
            height, width = self.group_size
            groups['group_size'] = height if height == width else (self.group_size,) * stages
        for key, values in self.groups.items():
            if len(values) == stages:
                groups[key] = values[0] if len(set(values)) == 1 else values
        return groups

    def variant(self) -> Tuple[str, Dict[str, Any]]:
        """Choose the variant that fits, and the arguments in which this checkpoint differs from it.

        What shapes cannot show is read from the file where it says so, a dense checkpoint's config and birder's
        position tables, and else has a default by origin. Official: the variant's groups; a dense ++ checkpoint G = 7
        and I = 8, 4, 2, 1, as all released dense configurations have. birder: G = 7 (224 pixels). vit-pytorch: its
        default windows (7; 8, 4, 2, 1) and heads of 32 channels.
        """
        args = self.arguments()
        num_classes, in_chans = args.pop('num_classes'), args.pop('in_chans')
        fitting = [name for name, known in _variants().items() if known == args]
        if fitting:
            name, differing = fitting[0], {}
        else:
            name = 'crossformer_pp_small' if args['cooling'] else 'crossformer_small'
            name = 'crossformer_lucidrains' if args['pos_bias'] == 'lucidrains' else name
            differing = {key: value for key, value in args.items() if value != _variants()[name][key]}
        default = timm.models.resolve_pretrained_cfg(name)
        if num_classes != default.num_classes:
            differing['num_classes'] = num_classes
        if in_chans != default.input_size[0]:
            differing['in_chans'] = in_chans
        if self.origin == 'official' and self.dense and args['cooling']:
            differing.update(group_size=7, interval=(8, 4, 2, 1))
        differing.update(self.trained_groups(len(args['depths'])))
        for key, default_groups in (('group_size', 7), ('interval', (8, 4, 2, 1))):
            if differing.get(key) == VARIANTS[name].get(key, default_groups):
                del differing[key]
        return name, differing


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
def _variants() -> Dict[str, Dict[str, Any]]:
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


def parse_state_dict(
        checkpoint: Mapping[str, Any],
        container: Optional[str] = None,
        model: Optional[nn.Module] = None,
) -> Checkpoint:
    """Find the CrossFormer in a checkpoint and give its tensors our names.

    Args:
        checkpoint: A state dict, or a training checkpoint that contains one.
        container: Key of the state dict in the checkpoint. None: the first of `CONTAINER_KEYS` it has.
        model: What it is to be loaded into, for the words of errors.

    Raises:
        CheckpointError: No CrossFormer, more than one, a key without a place, or a tensor that cannot be a weight.
    """
    state_dict, container = _open_container(checkpoint, container)
    found = _find(state_dict)
    if not found:
        whole = [key for key in CONTAINER_KEYS if isinstance(state_dict.get(key), (Foreign, nn.Module))]
        if whole:
            raise CheckpointError(
                f'A checkpoint needs a state dict, got a whole object under {_listed(whole)}. Save the state dict of '
                'the model, not the model.')
        raise CheckpointError(
            f'This is no checkpoint of a CrossFormer: its {len(state_dict)} keys are {_listed(state_dict)}. '
            'Official, vit-pytorch, birder and timm_crossformer checkpoints with their stem can be read.')
    if len(found) > 1:
        prefixes = ', '.join(repr(prefix) for _, prefix in found)
        raise CheckpointError(
            f'A checkpoint needs to hold one CrossFormer, got one under each of the prefixes {prefixes}. '
            'Pass only the keys with the prefix you want.')
    origin, prefix = found[0]
    result = Checkpoint(OrderedDict(), origin, prefix=prefix, container=container)
    if origin == 'birder':
        result.pretrained_cfg, result.label_names = _birder_facts(checkpoint)
    if origin == 'official':
        result.groups = _groups_in_config(checkpoint)
    rules = [(re.compile(pattern), target) for pattern, target in _RULES[origin]]
    # Other parts may stand beside a `backbone.` or segmentation-models-pytorch's encoder; beside anything else, they
    # are keys without a place.
    in_detector = prefix.endswith(('backbone.', 'encoder.model.'))
    rest: List[str] = []
    twice: List[str] = []
    for key, tensor in state_dict.items():
        if key == _COUNTER:
            continue
        if not key.startswith(prefix):
            (result.left_out if in_detector else rest).append(key)
            continue
        target = _rename(key[len(prefix):], rules) if rules else _canonical(key[len(prefix):])
        if target is None:
            rest.append(key)
        elif target == '':  # recomputed from the group size
            if key.endswith('.attn.biases') and origin == 'birder' and result.group_size is None:
                result.group_size = _group_size_of_table(key, tensor)
        elif target in result.state_dict:
            twice.append(f'{result.source_keys[target]} and {key}')
        else:
            result.state_dict[target] = _plain(key, tensor)
            result.source_keys[target] = key
    if twice:
        raise CheckpointError(f'A weight needs one source, got two: {_listed(twice)}. Remove one of each.')
    if rest:
        raise _no_place(model, result, rest)
    return result


def convert_state_dict(
        checkpoint: Mapping[str, Any],
        model: nn.Module,
        partial: bool = False,
) -> 'OrderedDict[str, Tensor]':
    """Bring a checkpoint of any origin into the form of a model; timm calls this with what it has read.

    Every key of the source lands in the model, once and in the right shape, but for the classifier and the stem,
    which timm adapts to another number of classes or channels. The norm and classifier may be missing together, as
    in the backbone of a detector, or the classifier alone. A pyramid (`features_only`) takes what it has.

    Args:
        checkpoint: A state dict or training checkpoint: official, vit-pytorch, birder or our own.
        model: The `CrossFormer` to be loaded, or its pyramid.
        partial: Let any weights be missing from the source.

    Returns:
        A state dict with the model's names.

    Raises:
        CheckpointError: Source keys have no place, weights of the model have no source, shapes differ.
    """
    try:
        parsed = parse_state_dict(checkpoint, model=model)
        if _is_pyramid(model):
            _keep_levels(parsed, model)
        check_fit(parsed, model, partial=partial, adapt=True)
        check_values(parsed)
        _check_groups(parsed, model)
    except TypeError as e:  # timm would call again with one argument, and hide the cause
        raise CheckpointError(f'The checkpoint cannot be read: {e}. Pass a state dict of tensors.') from e
    cfg = getattr(model, 'pretrained_cfg', None)
    head = parsed.state_dict.get('head.fc.weight')
    if cfg and head is not None and head.shape[0] == getattr(model, 'num_classes', 0):
        cfg['num_classes'] = head.shape[0]  # else timm would discard a classifier that fits
    if cfg:
        cfg.update(parsed.pretrained_cfg)
    if _is_pyramid(model):
        return OrderedDict((_in_pyramid(key), tensor) for key, tensor in parsed.state_dict.items())
    return parsed.state_dict


def _canonical(key: str) -> str:
    """Return our name of a weight in a pyramid: timm flattens `stages.0` to `stages_0` there."""
    return re.sub(r'^stages_(?=\d)', 'stages.', key)


def _in_pyramid(key: str) -> str:
    return re.sub(r'^stages\.(?=\d)', 'stages_', key)


def _is_pyramid(model: nn.Module) -> bool:
    return hasattr(model, 'stages_0')


def _keep_levels(parsed: Checkpoint, model: nn.Module) -> None:
    """Leave out what a pyramid does without: stages beyond its last level, the final norm, the classifier."""
    stages = {key.split('.')[0] for key in model.state_dict(keep_vars=True)}
    for key in list(parsed.state_dict):
        part = _in_pyramid(key).split('.')[0]
        if part in ('norm', 'head') or (part.startswith('stages_') and part not in stages):
            parsed.left_out.append(parsed.source_keys[key])
            del parsed.state_dict[key]


def is_foreign(state_dict: Mapping[str, Any], model: nn.Module) -> bool:
    """Tell a checkpoint that needs converting from a state dict with the model's own names, without cost."""
    if not isinstance(state_dict, Mapping):
        return False
    if _ANCHORS['native'] in state_dict:
        theirs = 'stages.' if _is_pyramid(model) else 'stages_'
        return any(key.startswith(theirs) or key == _COUNTER for key in state_dict)
    return any(isinstance(state_dict.get(key), Mapping) for key in CONTAINER_KEYS) or bool(_find(state_dict))


def check_variant(state_dict: Mapping[str, Any], model: nn.Module) -> None:
    """Explain why a state dict with the model's own names does not fit, where it is of another variant.

    Raises:
        CheckpointError: It is, in the words in which `convert_state_dict` says so.
    """
    if _ANCHORS['native'] not in state_dict:
        return
    parsed = parse_state_dict(state_dict, model=model)
    with suppress(CheckpointError):
        if _architecture(parsed.arguments()) == _own_architecture(model):
            return
    check_fit(parsed, model)


def check_head(state_dict: Mapping[str, Any], model: nn.Module) -> None:
    """Explain a norm or classifier that a strict load would only call missing.

    Raises:
        CheckpointError: The model has them, the state dict does not.
    """
    missing = [key for key in ('norm.weight', 'head.fc.weight')
               if key not in state_dict and key in model.state_dict(keep_vars=True)]
    if missing and _ANCHORS['native'] in state_dict:
        what = 'no final norm and no classifier, as a detection or segmentation backbone' if len(missing) == 2 else (
            'no classifier' if missing[0].startswith('head') else 'no final norm')
        raise CheckpointError(
            f'{_name(model)} needs {", ".join(missing)} for a strict load; the checkpoint has {what}. Load it with '
            '`strict=False`, or create the model with `features_only=True`, or with another `num_classes`.')


def read_checkpoint(path: Union[str, Path]) -> Mapping[str, Any]:
    """Read a checkpoint file without running anything in it.

    Args:
        path: A safetensors file, a file of `torch.save`, or OneFlow's in a zip, whatever its suffix.

    Raises:
        CheckpointError: The file is damaged, holds more than data, or is no checkpoint.
    """
    path = Path(path)
    checkpoint = read_file(path)
    size = path.stat().st_size
    if not isinstance(checkpoint, Mapping):
        kind = 'an object' if isinstance(checkpoint, Foreign) else f'a {type(checkpoint).__name__}'
        raise CheckpointError(
            f'A checkpoint needs to be a dict of tensors, {path} holds {kind}. Save the state dict, not the model.')
    if len(checkpoint) > _MAX_KEYS:
        raise CheckpointError(f'A checkpoint has at most {_MAX_KEYS} keys, {path} has {len(checkpoint)}.')
    claimed = sum(t.numel() * t.element_size() for t in _open_container(checkpoint, None)[0].values()
                  if isinstance(t, Tensor))
    if claimed > size and not is_packed(path):
        raise CheckpointError(
            f'The tensors of a file cannot be larger than the file, {path} has {size} bytes and claims {claimed}. '
            'Save contiguous tensors, without sharing.')
    return checkpoint


def _open_container(checkpoint: Mapping[str, Any], container: Optional[str]) -> Tuple[Mapping[str, Any], str]:
    """Return the state dict inside a training checkpoint, and the key it was found under."""
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(
            f'A checkpoint needs to be a dict of tensors, got {type(checkpoint).__name__}. Pass a state dict.')
    path: List[str] = []
    if container is not None:
        inner = checkpoint.get(container)
        if not isinstance(inner, Mapping):
            keys = [key for key, value in checkpoint.items() if isinstance(value, Mapping)]
            raise CheckpointError(
                f'The checkpoint has no state dict under {container!r}. It has dicts under {_listed(keys)}.')
        checkpoint, path = inner, [container]
    while len(path) < 3:
        key = next((key for key in CONTAINER_KEYS if isinstance(checkpoint.get(key), Mapping)), None)
        if key is None:
            break
        checkpoint = checkpoint[key]
        path.append(key)
    odd = [repr(key) for key in checkpoint if not isinstance(key, str)]
    if odd:
        raise CheckpointError(f'Keys of a state dict are strings, got {_listed(odd)}. Pass a state dict.')
    return checkpoint, '.'.join(path)


def _find(state_dict: Mapping[str, Any]) -> List[Tuple[str, str]]:
    """Return origin and prefix of every CrossFormer in a state dict."""
    found = []
    for origin, anchor in _ANCHORS.items():
        for key in state_dict:
            if isinstance(key, str) and f'.{key}'.endswith(f'.{anchor}'):
                found.append((origin, key[:-len(anchor)]))
    return found


def _rename(key: str, rules: Iterable[Tuple[re.Pattern, Any]]) -> Optional[str]:
    """Return our name of a key, '' if it is to be dropped, None if no rule knows it."""
    stem, _, last = key.rpartition('.')
    for pattern, target in rules:
        match = pattern.fullmatch(key if target is None else stem)
        if match:
            if target is None:
                return ''
            if last not in _LAST_PARTS:
                return None
            return f'{target(match) if callable(target) else match.expand(target)}.{_LAST_PARTS[last]}'
    return None


def _plain(key: str, tensor: Any) -> Tensor:
    """Check that a value can be a weight; take vit-pytorch's singleton dimensions off."""
    if not isinstance(tensor, Tensor):
        what = 'an object' if isinstance(tensor, Foreign) else type(tensor).__name__
        raise CheckpointError(f'`{key}` needs to be a tensor, got {what}. Check the checkpoint.')
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(
            f'`{key}` needs a floating point dtype, got {tensor.dtype}. Convert the checkpoint to fp32, fp16 or bf16.')
    if key.endswith(('.g', '.b')) and tensor.ndim == 4:
        return tensor.flatten() if tensor.numel() == tensor.shape[1] else tensor
    pointwise = re.search(r'\.(?:to_qkv|to_out|layers\.\d+\.[13]\.[14])\.weight$', key)
    return tensor.flatten(1) if pointwise and tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def _group_size_of_table(key: str, table: Any) -> Tuple[int, int]:
    """Read the group size from the offsets birder tabulates: 1 - G .. G - 1 per axis."""
    if not isinstance(table, Tensor) or table.ndim != 2 or table.shape[1] != 2 or table.shape[0] < 1:
        raise CheckpointError(f'`{key}` needs to be a table of offsets [N, 2]. Fetch the checkpoint again.')
    height, width = (int(n) + 1 for n in table.amax(dim=0))
    if height < 1 or width < 1 or (2 * height - 1) * (2 * width - 1) != table.shape[0]:
        raise CheckpointError(f'`{key}` needs all offsets of a group, got {tuple(table.shape)}. Fetch it again.')
    return height, width


def _groups_in_config(checkpoint: Mapping[str, Any]) -> Dict[str, Tuple[int, ...]]:
    """Read the groups in the config that mmdetection and mmsegmentation write into a checkpoint, as text."""
    meta = checkpoint.get('meta')
    texts = [meta.get(key) for key in ('config', 'cfg')] if isinstance(meta, Mapping) else []
    groups: Dict[str, Tuple[int, ...]] = {}
    for text in texts:
        if not isinstance(text, str):
            continue
        backbone = text[max(text.find('backbone'), 0):]
        for name, ours in (('group_size', 'group_size'), ('crs_interval', 'interval')):
            found = re.search(rf'\b{name}[\'"]?\s*[=:]\s*[\[(]([\d\s,]{{1,200}})[\])]', backbone)
            values = tuple(int(number) for number in re.findall(r'\d{1,4}', found[1])) if found else ()
            if values and min(values) > 0:
                groups.setdefault(ours, values)
    return groups


def _birder_facts(checkpoint: Mapping[str, Any]) -> Tuple[Dict[str, Any], Optional[List[str]]]:
    """Read input size, mean, std and class names from birder's container, as far as they are there and whole."""
    cfg: Dict[str, Any] = {}
    stats, signature, classes = (checkpoint.get(key) for key in ('rgb_stats', 'signature', 'class_to_idx'))
    for key in ('mean', 'std'):
        values = stats.get(key) if isinstance(stats, Mapping) else None
        if isinstance(values, (list, tuple)) and values and all(isinstance(v, (int, float)) for v in values):
            cfg[key] = tuple(float(v) for v in values)
    with suppress(KeyError, IndexError, TypeError, ValueError):
        channels, height, width = signature['inputs'][0]['data_shape'][1:4]  # type: ignore[index]  # None: TypeError
        cfg['input_size'] = (int(channels), int(height), int(width))
    if cfg:
        cfg.update(crop_pct=1.0, crop_mode='squash')  # birder resizes both sides
    if not isinstance(classes, Mapping) or sorted(classes.values(), key=str) != sorted(range(len(classes)), key=str):
        return cfg, None
    return cfg, [str(name) for name, _ in sorted(classes.items(), key=lambda item: item[1])]


def check_fit(
        parsed: Checkpoint,
        model: nn.Module,
        complete: bool = False,
        partial: bool = False,
        adapt: bool = False,
) -> None:
    """Check names and shapes against a model.

    Args:
        complete: Let nothing be missing.
        partial: Let anything be missing. Without either, the norm and classifier, or the classifier, may be.
        adapt: Let the stem and classifier have other channels and classes, which timm adapts.

    Raises:
        CheckpointError: They differ.
    """
    expected = {_canonical(key): tensor.shape for key, tensor in model.state_dict(keep_vars=True).items()}
    source = parsed.state_dict
    rest = [parsed.source_keys[key] for key in source if key not in expected and not key.startswith('head.fc.')]
    if rest:
        raise _no_place(model, parsed, rest)
    differing = [
        f'{parsed.source_keys[key]} {tuple(tensor.shape)} for {tuple(expected[key])}' for key, tensor in source.items()
        if key in expected and tensor.shape != expected[key]
        and not (adapt and _adaptable(key, tensor.shape, expected[key]))
    ]
    if differing:
        raise CheckpointError(
            f'{_name(model)}: {len(differing)} weights have another shape: {_listed(differing)}.'
            f'{_hint(parsed, model) or " Fetch the checkpoint again."}')
    missing = [key for key in expected if key not in source]
    head = {key for key in missing if key.startswith('head.fc.')}
    norm = {key for key in missing if key.startswith('norm.')}
    tail = {key for key in expected if key.startswith(('norm.', 'head.fc.'))}
    whole_head = head == {key for key in tail if key.startswith('head.fc.')}
    allowed = not complete and ((head | norm) == tail or (whole_head and not norm))
    lost = [key for key in missing if key not in head | norm or not allowed]
    if lost and not partial:
        raise CheckpointError(
            f'{_name(model)}: the checkpoint lacks {len(lost)} weights: {_listed(lost)}.'
            f'{_hint(parsed, model) or " It is incomplete: fetch it again."}')


def check_values(parsed: Checkpoint) -> None:
    """Check that every weight is finite.

    Raises:
        CheckpointError: Some are not.
    """
    # A finite sum needs finite values and is quick to have; fp16 may overflow, so only then are values looked at.
    # fp8 has neither.
    wide = ((key, tensor.float() if tensor.element_size() < 2 else tensor) for key, tensor in parsed.state_dict.items())
    infinite = [parsed.source_keys[key] for key, tensor in wide
                if not tensor.is_meta and not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all()]
    if infinite:
        raise CheckpointError(
            f'Weights need finite values, {len(infinite)} have NaN or infinity: {_listed(infinite)}. '
            'The training diverged or the file is damaged: use another checkpoint.')


def _adaptable(key: str, shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Tell differences that timm adapts: the number of classes, and of image channels."""
    if key.startswith('head.fc.'):
        return len(shape) == len(expected) and list(shape[1:]) == list(expected[1:])
    if re.fullmatch(r'stem\.convs\.\d+\.weight', key):
        return len(shape) == 4 and [shape[0], *shape[2:]] == [expected[0], *expected[2:]]
    return False


def _check_groups(parsed: Checkpoint, model: nn.Module) -> None:
    """Warn if weights meet other groups than the file says they have, which no shape of a weight would show."""
    depths: Any = getattr(model, 'depths', ())
    for name, value in parsed.trained_groups(len(depths)).items():
        given = getattr(model, name, None)
        if given is None:
            continue
        spread = resolve_group_size if name == 'group_size' else lambda name, v, depths: per_stage(name, v, len(depths))
        if spread(name, value, depths) != spread(name, given, depths):
            groups = 'groups of ' + ' x '.join(map(str, parsed.group_size)) if parsed.group_size else f'{name}={value}'
            warnings.warn(
                f'The checkpoint was trained with {groups}, {_name(model)} has {name}={given}. '
                f'Create the model with `{name}={value}` for its outputs.',
                stacklevel=3)


def _no_place(model: Optional[nn.Module], parsed: Checkpoint, rest: Sequence[str]) -> CheckpointError:
    what = f'{len(rest)} checkpoint keys have' if len(rest) > 1 else '1 checkpoint key has'
    hint = _hint(parsed, model) or ' The rest of the checkpoint fits: take these keys out, or fetch it again.'
    return CheckpointError(f'{_name(model)}: {what} no place: {_listed(rest)}.{hint}')


def _hint(parsed: Checkpoint, model: Optional[nn.Module]) -> str:
    """Name the variant a checkpoint fits, if it is another one than the model; '' if it is of the model's own shape."""
    try:
        args = parsed.arguments()
    except CheckpointError:
        return ' Fetch the checkpoint again, or use one of another origin.'
    fitting = [variant for variant, known in _variants().items() if known == _architecture(args)]
    if _architecture(args) == _own_architecture(model) or (model is None and fitting):
        return ''
    if fitting:
        cooled = any('.cooling.' in key for key in parsed.state_dict)
        acl = cooled and not _name(model).startswith('crossformer_pp_')
        reason = 'It holds amplitude cooling layers (ACL)' if acl else 'It is of another variant'
        return f' {reason}: try {" or ".join(fitting)}.'
    own = _own_architecture(model)
    shown = [key for key in own if args[key] != own[key]] if own else ['embed_dim', 'depths', 'num_heads']
    told = ', '.join(f'{key}={args[key]}' for key in shown)
    return f' It fits no variant: {told}. Create the model with these arguments, or fetch the checkpoint again.'


def _architecture(args: Mapping[str, Any]) -> Dict[str, Any]:
    """Return what makes a variant: all arguments but the numbers of channels and classes."""
    return {key: value for key, value in args.items() if key not in ('in_chans', 'num_classes')}


def _own_architecture(model: Optional[nn.Module]) -> Optional[Dict[str, Any]]:
    if model is None:
        return None
    with suppress(CheckpointError):
        return _architecture(infer_arguments({
            _canonical(key): tensor for key, tensor in model.state_dict(keep_vars=True).items()}))
    return None


def _name(model: Optional[nn.Module]) -> str:
    if model is None:
        return 'CrossFormer'
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__


def _listed(keys: Iterable[str]) -> str:
    ordered = sorted(map(str, keys))
    more = f' and {len(ordered) - _SHOWN} more' if len(ordered) > _SHOWN else ''
    return ', '.join(key[:200] for key in ordered[:_SHOWN]) + more
