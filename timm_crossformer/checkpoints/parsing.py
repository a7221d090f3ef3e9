"""Find the CrossFormer in a checkpoint, and give its tensors our names."""
import re
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from .architecture import hint, infer_arguments, listed, name_of
from .errors import CheckpointError
from .names import CONTAINERS, COUNTER, find_networks, is_part, rename
from .reading import Foreign, read_checkpoint

__all__ = ['Checkpoint', 'open_checkpoint', 'parse_state_dict']

_DEPTH = 4  # containers inside each other


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
        adaptive: That config lets intervals follow from the size of the map.
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
    adaptive: bool = False
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

    def drop_classifier(self) -> None:
        """Leave the classifier out."""
        for key in ('head.fc.weight', 'head.fc.bias'):
            self.state_dict.pop(key, None)

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


class _Network(NamedTuple):
    """A CrossFormer somewhere in a checkpoint."""

    containers: Tuple[str, ...]
    state_dict: Mapping[Any, Any]
    origin: str
    prefix: str

    @property
    def path(self) -> str:
        """What `--key` names, wholly or in part: keys of containers, and the prefix."""
        return '.'.join(part for part in (*self.containers, self.prefix.rstrip('.')) if part)


def open_checkpoint(path: Union[str, Path], key: Optional[str] = None) -> Checkpoint:
    """Read a checkpoint file, and find the CrossFormer in it. See `read_checkpoint` and `parse_state_dict`.

    Raises:
        CheckpointError: As they do; or its weights are larger than what is stored.
    """
    parsed = parse_state_dict(read_checkpoint(path), key)
    tensors = parsed.state_dict.values()
    claimed = sum(tensor.nbytes for tensor in tensors)
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    if claimed > sum(stored.values()):
        raise CheckpointError(
            f'The weights of a file cannot be larger than what it stores, {path} stores {sum(stored.values())} bytes '
            f'and claims {claimed}. Save contiguous tensors, without sharing.')
    parsed.state_dict.update({name: tensor.resolve_neg() for name, tensor in parsed.state_dict.items()})
    return parsed


def parse_state_dict(
        checkpoint: Mapping[str, Any],
        key: Optional[str] = None,
        model: Optional[nn.Module] = None,
) -> Checkpoint:
    """Find the CrossFormer in a checkpoint and give its tensors our names.

    Args:
        checkpoint: A state dict, or a training checkpoint that contains one.
        key: Where it is, if there are several: part of the path of keys and prefix, as 'model' or 'online_model'.
        model: What it is to be loaded into, for the words of errors.

    Raises:
        CheckpointError: No CrossFormer, more than one, a key without a place, or a tensor that cannot be a weight.
    """
    network = _choose(checkpoint, key)
    state_dict, origin, prefix = network.state_dict, network.origin, network.prefix
    odd = [repr(name) for name in state_dict if not isinstance(name, str)]
    if odd:
        raise CheckpointError(f'Keys of a state dict are strings, got {listed(odd)}. Pass a state dict.')
    result = Checkpoint(OrderedDict(), origin, prefix=prefix, container='.'.join(network.containers))
    if origin == 'birder':
        result.pretrained_cfg, result.label_names = _birder_facts(checkpoint)
    if origin == 'official':
        result.groups, result.adaptive = _groups_in_config(checkpoint)
    by_prefix = key is not None and f'.{key.strip(".")}.' not in f'.{".".join(network.containers)}.'
    in_others = is_part(prefix) or by_prefix
    rest: List[str] = []
    twice: List[str] = []
    for name, tensor in state_dict.items():
        if name == COUNTER:
            continue
        if not name.startswith(prefix):
            (result.left_out if in_others else rest).append(name)
            continue
        target = rename(name[len(prefix):], origin)
        if target is None:
            rest.append(name)
        elif target == '':  # recomputed from the group size
            if name.endswith('.attn.biases') and origin == 'birder' and result.group_size is None:
                result.group_size = _group_size_of_table(name, tensor)
        elif target in result.state_dict:
            twice.append(f'{result.source_keys[target]} and {name}')
        else:
            result.state_dict[target] = _plain(name, tensor)
            result.source_keys[target] = name
    if twice:
        raise CheckpointError(f'A weight needs one source, got two: {listed(twice)}. Remove one of each.')
    if rest:
        raise no_place(model, result, rest)
    return result


def _networks(
        checkpoint: Mapping[Any, Any],
        containers: Tuple[str, ...] = (),
        seen: Optional[Dict[int, Any]] = None,
) -> List[_Network]:
    """Find every CrossFormer in a checkpoint and the dicts inside it, each once."""
    seen = {} if seen is None else seen
    if id(checkpoint) in seen or len(containers) > _DEPTH:
        return []
    seen[id(checkpoint)] = checkpoint
    found = [_Network(containers, checkpoint, *network) for network in find_networks(checkpoint)]
    for key, value in checkpoint.items():
        if isinstance(value, Mapping):
            found += _networks(value, (*containers, str(key)), seen)
    return found


def _choose(checkpoint: Mapping[str, Any], key: Optional[str]) -> _Network:
    """Return the one network of a checkpoint that is meant."""
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(
            f'A checkpoint needs to be a dict of tensors, got {type(checkpoint).__name__}. Pass a state dict.')
    found = _networks(checkpoint)
    if not found:
        raise _nothing_found(checkpoint)
    named = [network for network in found if key is None or f'.{key.strip(".")}.' in f'.{network.path}.']
    if not named:
        raise CheckpointError(
            f'The checkpoint has no CrossFormer under {key!r}. It has one under '
            f'{" and ".join(repr(network.path) for network in found)}.')
    ranks = [_rank(network) for network in named]
    best = [network for network, rank in zip(named, ranks, strict=True) if rank == min(ranks)]
    if len(best) > 1:
        raise CheckpointError(
            f'A checkpoint needs to hold one CrossFormer, got one under each of '
            f'{", ".join(repr(network.path) for network in best)}. Choose one by `--key`.')
    return best[0]


def _rank(network: _Network) -> List[int]:
    """Order containers by preference, from the outermost; those that nobody knows come last, the file itself first."""
    return [CONTAINERS.index(name) if name in CONTAINERS else len(CONTAINERS) for name in network.containers]


def _nothing_found(checkpoint: Mapping[str, Any]) -> CheckpointError:
    whole = [key for key, value in checkpoint.items() if isinstance(value, nn.Module) or (
        isinstance(value, Foreign) and key in CONTAINERS)]
    if whole:
        return CheckpointError(
            f'A checkpoint needs a state dict, got a whole object under {listed(whole)}. Save the state dict of '
            'the model, not the model.')
    inside = next((value for key in CONTAINERS if isinstance(value := checkpoint.get(key), Mapping)), checkpoint)
    return CheckpointError(
        f'This is no checkpoint of a CrossFormer: its {len(inside)} keys are {listed(inside)}. '
        'Official, vit-pytorch, birder and timm_crossformer checkpoints with their stem can be read.')


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


def _groups_in_config(checkpoint: Mapping[str, Any]) -> Tuple[Dict[str, Tuple[int, ...]], bool]:
    """Read the groups in the config that mmdetection and mmsegmentation write into a checkpoint, as text."""
    adaptive = False
    meta = checkpoint.get('meta')
    texts = [meta.get(key) for key in ('config', 'cfg')] if isinstance(meta, Mapping) else []
    groups: Dict[str, Tuple[int, ...]] = {}
    for text in texts:
        if not isinstance(text, str):
            continue
        backbone = text[max(text.find('backbone'), 0):]
        adaptive = adaptive or re.search(r'\badaptive_interval[\'"]?\s*[=:]\s*true\b', backbone, re.I) is not None
        for name, ours in (('group_size', 'group_size'), ('crs_interval', 'interval')):
            found = re.search(rf'\b{name}[\'"]?\s*[=:]\s*[\[(]([\d\s,]{{1,200}})[\])]', backbone)
            values = tuple(int(number) for number in re.findall(r'\d{1,4}', found[1])) if found else ()
            if values and min(values) > 0:
                groups.setdefault(ours, values)
    return groups, adaptive


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


def no_place(model: Optional[nn.Module], parsed: Checkpoint, rest: List[str]) -> CheckpointError:
    """Return the error for keys that have no place in a model."""
    what = f'{len(rest)} checkpoint keys have' if len(rest) > 1 else '1 checkpoint key has'
    advice = hint(parsed.state_dict, model) or (
        ' The rest of the checkpoint fits: take these keys out, or fetch it again.')
    return CheckpointError(f'{name_of(model)}: {what} no place: {listed(rest)}.{advice}')
