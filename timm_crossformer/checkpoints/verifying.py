"""Check directories of weights, and create models from whatever holds some."""
import dataclasses
import json
from pathlib import Path
from typing import Any, List, Optional, Tuple

import timm
import torch
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import Tensor

from . import records
from .errors import CheckpointError, UnknownWeightsError
from .files import PathLike, hash_file
from .fitting import check_fit, check_values
from .parsing import Checkpoint, open_checkpoint
from .planning import plan_model
from .writing import CONFIG_NAME, WEIGHTS_NAME

__all__ = ['Check', 'check_directory', 'check_name', 'load_model', 'verify_directory']


@dataclasses.dataclass(frozen=True)
class Check:
    """One check of a directory."""

    check: str
    ok: bool
    detail: str


def verify_directory(
        directory: PathLike,
        against: Optional[PathLike] = None,
        photo: bool = True,
) -> List[Check]:
    """Check a directory that `convert_file` or timm wrote.

    Args:
        directory: With model.safetensors and config.json.
        against: A checkpoint whose weights and outputs it must reproduce, in the precision it was written in.
        photo: Have a classifier of 1000 classes, ImageNet's then, name the cat on a photo.

    Returns:
        The checks, up to the first that makes further ones impossible.
    """
    directory = Path(directory)
    checks: List[Check] = []

    def check(name: str, ok: bool, detail: str) -> bool:
        checks.append(Check(name, bool(ok), detail))
        return bool(ok)

    weights, config_path = directory / WEIGHTS_NAME, directory / CONFIG_NAME
    missing = [path.name for path in (weights, config_path) if not path.is_file()]
    if not check('files', not missing, f'missing: {", ".join(missing)}' if missing else 'complete'):
        return checks
    try:
        config = json.loads(config_path.read_text(encoding='utf-8'))
        recorded = (config.get('timm_crossformer') or {}).get('sha256')
        net: Any = timm.create_model(f'local-dir:{directory}', device='meta')
    except Exception as e:  # a config may be wrong in any way
        check('config', False, f'{type(e).__name__}: {e}')
        return checks
    check('config', True, config['architecture'])
    got = hash_file(weights)
    same = recorded in (None, got)
    check('sha256', same, f'got {got}, recorded {recorded}' if not same else (
        got if recorded else f'{got} (none recorded to compare with)'))
    try:
        parsed = open_checkpoint(weights)
        check('read', True, f'{len(parsed.state_dict)} tensors')
        check_fit(parsed, net, complete=True)
        check('keys and shapes', True, f'all {len(net.state_dict())} weights')
        check_values(parsed)
        check('values', True, 'finite')
    except CheckpointError as e:
        check('weights', False, str(e))
        return checks
    net = timm.create_model(f'local-dir:{directory}', pretrained=True).eval()
    image = torch.rand(1, *net.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = net(image)
    check('forward', bool(torch.isfinite(output).all()), f'{list(image.shape)} -> {list(output.shape)}')
    if photo and net.num_classes == 1000:
        check('photo', *_names_the_cat(net))
    if against is not None:
        try:
            check('against', *_compare(directory, parsed, image, output, Path(against)))
        except CheckpointError as e:
            check('against', False, str(e))
    return checks


def check_directory(directory: Path) -> None:
    """Raise CheckpointError with the first check that a directory fails."""
    for check in verify_directory(directory, photo=False):  # others have 1000 classes, too
        if not check.ok:
            raise CheckpointError(
                f'{directory} fails the check of {check.check}: {check.detail.rstrip(".")}. Convert it again.')


_CATS = range(281, 286)  # ImageNet-1k's classes of domestic cats


def _names_the_cat(net: Any) -> Tuple[bool, str]:
    """Tell whether the five likeliest classes of the photo hold a cat, which chance finds once in 40 times."""
    if net.in_chans != 3:
        return True, f'not tried with {net.in_chans} channels'
    from PIL import Image

    path = records.photo_path()
    if not path.is_file():
        return False, 'the photo of the package is missing: install it again'
    with Image.open(path) as image:
        pixels = create_transform(**resolve_data_config({}, model=net))(image.convert('RGB'))
    with torch.inference_mode():
        top = net(pixels[None])[0].softmax(dim=0).topk(5)
    names = ImageNetInfo()
    named = ', '.join(
        f'{names.index_to_description(int(i)).split(",")[0]} {p:.0%}'
        for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True))
    return any(int(i) in _CATS for i in top.indices), f'a cat is shown, seen are {named}'


def _compare(directory: Path, parsed: Checkpoint, image: Tensor, output: Tensor, source: Path) -> Tuple[bool, str]:
    """Compare weights and outputs with those of a source, in the directory's own network."""
    other = open_checkpoint(source)
    if 'head.fc.weight' not in parsed.state_dict:
        other.drop_classifier()
    check_values(other)
    reference: Any = timm.create_model(f'local-dir:{directory}').eval()
    check_fit(other, reference, complete=not other.dense)
    reference.load_state_dict(other.state_dict, strict=not other.dense)
    dtype = next(iter(parsed.state_dict.values())).dtype
    changed = [
        key for key, tensor in other.state_dict.items()
        if key not in parsed.state_dict or not torch.equal(tensor.to(dtype), parsed.state_dict[key])
    ]
    with torch.inference_mode():
        expected = reference(image)
    difference = (output - expected).abs().max().item()
    # Weights kept as they are give the same output to the last bit; cast ones differ by the precision of the cast.
    bound = 0. if all(t.dtype == dtype for t in other.state_dict.values()) else (
        8 * torch.finfo(dtype).eps * max(expected.abs().max().item(), 1.))
    detail = f'outputs differ by {difference:.3g} at most, {bound:.3g} allowed; {len(changed)} weights differ'
    if other.group_size and tuple(reference.stages[0].blocks[0].attn.group_size) != other.group_size:
        return False, f'{detail}; groups are not those of the source, {other.group_size}'
    return difference <= bound and not changed, detail


def check_name(name: str, pretrained: bool) -> None:
    """Check that timm knows a model by a name, and weights for it if they are wanted.

    Raises:
        UnknownWeightsError: It does not.
    """
    if ':' in name:  # of a directory or repository
        return
    variant, _, tag = name.partition('.')
    if not timm.is_model(variant):
        raise UnknownWeightsError(f'Unknown model ({name}).')
    if pretrained and not timm.models.is_model_pretrained(name):
        raise UnknownWeightsError(f'No weights for {name}.')
    if tag and name not in timm.list_models(f'{variant}.*', include_tags=True):
        raise UnknownWeightsError(f'Invalid pretrained tag ({tag}) for {variant}.')


def load_model(model: Optional[str] = None, weights: Optional[PathLike] = None, **kwargs: Any) -> Any:
    """Create a model with weights, for evaluation.

    Args:
        model: Name for `timm.create_model`; None infers it from the weights.
        weights: A directory that timm can load, or a checkpoint file of any origin; None takes the model's own.
        kwargs: Further arguments of the model.

    Raises:
        UnknownWeightsError: The name stands for no weights.
        CheckpointError: The weights cannot be used.
        FetchError: The model's own cannot be had.
        ValueError: Neither is given, or both where one says all.
    """
    if weights is None:
        if model is None:
            raise ValueError('A model needs a name or weights. Pass `--model` or `--weights`.')
        check_name(model, pretrained=True)
        return timm.create_model(model, pretrained=True, **kwargs).eval()
    weights = Path(weights)
    if weights.is_dir():
        if model is not None:
            raise ValueError('A directory of weights names its model itself. Leave `--model` out.')
        try:
            return timm.create_model(f'local-dir:{weights}', pretrained=True, **kwargs).eval()
        except Exception:  # a directory may be wrong in any way
            check_directory(weights)
            raise
    parsed = open_checkpoint(weights)
    plan = plan_model(parsed, model)
    shown = parsed.arguments()
    cfg = dict(state_dict=parsed.state_dict, num_classes=shown['num_classes'], **parsed.pretrained_cfg)
    cfg['label_names'] = tuple(parsed.label_names) if parsed.label_names else None  # not those of the variant's weights
    default = timm.models.resolve_pretrained_cfg(plan.model)
    cfg['input_size'] = (shown['in_chans'], *cfg.get('input_size', default.input_size)[1:])
    if parsed.dense and not kwargs.get('features_only'):
        raise CheckpointError(f'{weights} has no classifier. Use `features`, or weights of a classifier.')
    net: Any = timm.create_model(
        plan.model, pretrained=True, pretrained_cfg_overlay=cfg, **{**plan.args, **kwargs}).eval()
    net.pretrained_cfg.pop('state_dict', None)
    return net
