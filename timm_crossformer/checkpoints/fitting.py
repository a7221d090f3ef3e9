"""Fit weights to a model: names, shapes, values, groups. Whatever loads weights passes through here.

The model's own `load_state_dict` and timm's `pretrained=True` call it as `convert_state_dict`.
"""
import math
import re
import warnings
from collections import OrderedDict
from contextlib import suppress
from typing import Any, ContextManager, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import per_stage, resolve_group_size
from .architecture import architecture_of, hint, listed, name_of, own_architecture, own_shapes
from .errors import CheckpointError
from .names import ANCHORS, COUNTER, find_networks, in_pyramid
from .parsing import Checkpoint, no_place, parse_state_dict

__all__ = [
    'check_fit', 'check_head', 'check_values', 'check_variant', 'convert_state_dict', 'fit', 'is_foreign',
    'safe_globals']


class InertConfig:
    """Stands in for yacs' config node, which official checkpoints hold, so that no foreign code is imported or run."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


def safe_globals() -> ContextManager:
    """Let `torch.load(..., weights_only=True)` read official checkpoints with their config inside, for as long."""
    return torch.serialization.safe_globals([(InertConfig, 'yacs.config.CfgNode')])


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
        return fit(parse_state_dict(checkpoint, model=model), model, partial)
    except TypeError as e:  # timm would call again with one argument, and hide the cause
        raise CheckpointError(f'The checkpoint cannot be read: {e}. Pass a state dict of tensors.') from e


def fit(parsed: Checkpoint, model: nn.Module, partial: bool = False) -> 'OrderedDict[str, Tensor]':
    """Check weights against a model as `convert_state_dict` says, and return them by the model's names."""
    if _is_pyramid(model):
        _keep_levels(parsed, model)
    check_fit(parsed, model, partial=partial, adapt=True)
    check_values(parsed)
    _check_groups(parsed, model)
    cfg = getattr(model, 'pretrained_cfg', None)
    head = parsed.state_dict.get('head.fc.weight')
    if cfg and head is not None and head.shape[0] == getattr(model, 'num_classes', 0):
        cfg['num_classes'] = head.shape[0]  # else timm would discard a classifier that fits
    if cfg:
        cfg.update(parsed.pretrained_cfg)
    if _is_pyramid(model):
        return OrderedDict((in_pyramid(key), tensor) for key, tensor in parsed.state_dict.items())
    return parsed.state_dict


def _is_pyramid(model: nn.Module) -> bool:
    return hasattr(model, 'stages_0')


def _keep_levels(parsed: Checkpoint, model: nn.Module) -> None:
    """Leave out what a pyramid does without: stages beyond its last level, the final norm, the classifier."""
    stages = {key.split('.')[0] for key in model.state_dict(keep_vars=True)}
    for key in list(parsed.state_dict):
        part = in_pyramid(key).split('.')[0]
        if part in ('norm', 'head') or (part.startswith('stages_') and part not in stages):
            parsed.left_out.append(parsed.source_keys[key])
            del parsed.state_dict[key]


def is_foreign(state_dict: Mapping[str, Any], model: nn.Module) -> bool:
    """Tell a checkpoint that needs converting from a state dict with the model's own names, without cost."""
    if not isinstance(state_dict, Mapping):
        return False
    if ANCHORS['native'] in state_dict:
        theirs = 'stages.' if _is_pyramid(model) else 'stages_'
        return any(key.startswith(theirs) or key == COUNTER for key in state_dict)
    return any(isinstance(value, Mapping) for value in state_dict.values()) or bool(find_networks(state_dict))


def check_variant(state_dict: Mapping[str, Any], model: nn.Module) -> None:
    """Explain why a state dict with the model's own names does not fit, where it is of another variant.

    Raises:
        CheckpointError: It is, in the words in which `convert_state_dict` says so.
    """
    if ANCHORS['native'] not in state_dict:
        return
    parsed = parse_state_dict(state_dict, model=model)
    with suppress(CheckpointError):
        if architecture_of(parsed.arguments()) == own_architecture(model):
            return
    check_fit(parsed, model)


def check_head(state_dict: Mapping[str, Any], model: nn.Module) -> None:
    """Explain a norm or classifier that a strict load would only call missing.

    Raises:
        CheckpointError: The model has them, the state dict does not.
    """
    missing = [key for key in ('norm.weight', 'head.fc.weight')
               if key not in state_dict and key in model.state_dict(keep_vars=True)]
    if missing and ANCHORS['native'] in state_dict:
        what = 'no final norm and no classifier, as a detection or segmentation backbone' if len(missing) == 2 else (
            'no classifier' if missing[0].startswith('head') else 'no final norm')
        raise CheckpointError(
            f'{name_of(model)} needs {", ".join(missing)} for a strict load; the checkpoint has {what}. Load it with '
            '`strict=False`, or create the model with `features_only=True`, or with another `num_classes`.')


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
    expected = {key: tensor.shape for key, tensor in own_shapes(model).items()}
    source = parsed.state_dict
    rest = [parsed.source_keys[key] for key in source if key not in expected and not key.startswith('head.fc.')]
    if rest:
        raise no_place(model, parsed, rest)
    differing = [
        f'{parsed.source_keys[key]} {tuple(tensor.shape)} for {tuple(expected[key])}' for key, tensor in source.items()
        if key in expected and tensor.shape != expected[key]
        and not (adapt and _adaptable(key, tensor.shape, expected[key]))
    ]
    if differing:
        raise CheckpointError(
            f'{name_of(model)}: {len(differing)} weights have another shape: {listed(differing)}.'
            f'{hint(parsed.state_dict, model) or " Fetch the checkpoint again."}')
    missing = [key for key in expected if key not in source]
    head = {key for key in missing if key.startswith('head.fc.')}
    norm = {key for key in missing if key.startswith('norm.')}
    tail = {key for key in expected if key.startswith(('norm.', 'head.fc.'))}
    whole_head = head == {key for key in tail if key.startswith('head.fc.')}
    allowed = not complete and ((head | norm) == tail or (whole_head and not norm))
    lost = [key for key in missing if key not in head | norm or not allowed]
    if lost and not partial:
        raise CheckpointError(
            f'{name_of(model)}: the checkpoint lacks {len(lost)} weights: {listed(lost)}.'
            f'{hint(parsed.state_dict, model) or " It is incomplete: fetch it again."}')


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
            f'Weights need finite values, {len(infinite)} have NaN or infinity: {listed(infinite)}. '
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
    if parsed.adaptive and getattr(model, 'lda_grouping', 'grid') != 'grid':
        warnings.warn(
            'The checkpoint was trained with `adaptive_interval=True`: intervals follow from the size of the map. '
            "Create the model with `lda_grouping='grid'`, which is the same for square images.", stacklevel=3)
    depths: Any = getattr(model, 'depths', ())
    for name, value in parsed.trained_groups(len(depths)).items():
        given = getattr(model, name, None)
        if given is None:
            continue
        spread = resolve_group_size if name == 'group_size' else lambda name, v, depths: per_stage(name, v, len(depths))
        if spread(name, value, depths) != spread(name, given, depths):
            groups = 'groups of ' + ' x '.join(map(str, parsed.group_size)) if parsed.group_size else f'{name}={value}'
            warnings.warn(
                f'The checkpoint was trained with {groups}, {name_of(model)} has {name}={given}. '
                f'Create the model with `{name}={value}` for its outputs.',
                stacklevel=3)
