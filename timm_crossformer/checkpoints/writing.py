"""Write weights as a directory that timm and the Hub can load: safetensors, config, model card."""
import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Optional

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .._timm import save_config_for_hf
from .errors import CheckpointError, WeightsError
from .files import PathLike, Progress, hash_file, new_files, printable, sync
from .fitting import check_fit, check_values
from .parsing import Checkpoint, open_checkpoint
from .planning import Plan, plan_model
from .records import Conversion

__all__ = [
    'CARD_NAME', 'CONFIG_NAME', 'WEIGHTS_NAME', 'convert_file', 'open_source', 'tensor_digest', 'write_directory']

WEIGHTS_NAME, CONFIG_NAME, CARD_NAME = 'model.safetensors', 'config.json', 'README.md'


class OpenSource(NamedTuple):
    """A checkpoint file that was read and checked."""

    path: Path
    parsed: Checkpoint
    sha256: str


def convert_file(
        source: PathLike,
        directory: PathLike,
        model: Optional[str] = None,
        groups: Optional[Mapping[str, Any]] = None,
        num_classes: Optional[int] = None,
        dtype: Optional[torch.dtype] = None,
        key: Optional[str] = None,
        expected_sha256: Optional[str] = None,
        license: Optional[str] = None,
        overwrite: bool = False,
        progress: Optional[Progress] = None,
) -> Conversion:
    """Convert a checkpoint file into a directory that timm and the Hub can load.

    A new directory appears complete or not at all; in an existing one files are replaced whole, the weights first.

    Args:
        source: Checkpoint file.
        directory: Directory to write.
        model: Variant; None infers it from the shapes.
        groups: `group_size`, `lda_group_size`, `interval`, `lda_grouping` as in `CrossFormer`, instead of what the
            checkpoint says, or the default of its origin.
        num_classes: 0 leaves the classifier out; another number must be that of the checkpoint.
        dtype: Of the weights written; None keeps the source's.
        key: Where the network is in the checkpoint; None finds it.
        expected_sha256: Hash, or its beginning, that the source must have.
        license: Licence of the weights for the model card.
        overwrite: Replace the files of an existing directory.
        progress: Called with the number of bytes just processed, twice the size of the source in all.

    Returns:
        What was read and written: model, arguments, hashes, sizes.

    Raises:
        CheckpointError: The checkpoint cannot be used; nothing was written.
        WeightsError: The directory cannot be written.
    """
    source, directory = Path(source), Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f'The output needs to be a directory, {directory} is a file. Name another one.')
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise CheckpointError(f'{directory} has files already. Name another directory, or pass `--overwrite`.')
    opened = open_source(source, key, progress)
    if expected_sha256 is not None and not (expected_sha256 and opened.sha256.startswith(expected_sha256.lower())):
        raise CheckpointError(
            f'{source} needs a sha256 beginning with {expected_sha256!r}, got {opened.sha256}. Fetch it again.')
    plan = plan_model(opened.parsed, model, groups, num_classes=num_classes)
    written = write_directory(opened, plan, directory, dtype, license)
    if progress is not None:
        progress(source.stat().st_size)
    return written


def open_source(path: Path, key: Optional[str] = None, progress: Optional[Progress] = None) -> OpenSource:
    """Read, parse and check a checkpoint file, and hash it meanwhile.

    Raises:
        CheckpointError: It cannot be used.
    """
    with ThreadPoolExecutor() as pool:  # hashing reads the file a second time: beside the first, not after it
        hashing = pool.submit(hash_file, path, progress) if path.is_file() else None
        parsed = open_checkpoint(path, key)
        check_values(parsed)
        return OpenSource(path, parsed, hashing.result() if hashing else '')


def write_directory(
        source: OpenSource,
        plan: Plan,
        directory: Path,
        dtype: Optional[torch.dtype] = None,
        license: Optional[str] = None,
        **provenance: Any,
) -> Conversion:
    """Write weights for a planned network.

    Args:
        source: Where they are from.
        plan: The network.
        directory: Directory to write.
        dtype: Of the weights written; None keeps the source's.
        license: Licence of the weights for the model card.
        provenance: Further fields of `Conversion`, of weights that were fetched.

    Raises:
        CheckpointError: The weights do not fit the network, or the dtype; nothing was written.
        WeightsError: The directory cannot be written.
    """
    parsed = source.parsed
    dense = parsed.dense
    net: Any = timm.create_model(plan.model, device='meta', **plan.args)
    check_fit(parsed, net, complete=not dense)
    tensors = _as_written(parsed, net, dtype)
    try:
        with new_files(directory) as temporary:
            weights = temporary / WEIGHTS_NAME
            save_file(tensors, weights, metadata={'format': 'pt'})
            del tensors
            with ThreadPoolExecutor() as pool:
                syncing = pool.submit(sync, weights)
                written_hash = hash_file(weights)
                syncing.result()
            written = Conversion(
                model=plan.model,
                args=plan.args,
                origin=parsed.origin,
                dense=dense,
                container=printable(parsed.container),
                prefix=printable(parsed.prefix),
                left_out=len(parsed.left_out),
                groups_from=plan.groups_from,
                num_classes=net.num_classes,
                params=sum(p.numel() for p in net.parameters()),
                dtype=str(dtype or next(iter(parsed.state_dict.values())).dtype).replace('torch.', ''),
                source=printable(source.path.name),
                source_sha256=source.sha256,
                sha256=written_hash,
                size=weights.stat().st_size,
                digest=tensor_digest(parsed.state_dict),
                **provenance,
            )
            _write_config(net, temporary / CONFIG_NAME, parsed, written, license)
            card = model_card(written, printable(directory.resolve().name), license)
            (temporary / CARD_NAME).write_text(card, encoding='utf-8')
    except (SafetensorError, OSError) as e:
        words = getattr(e, 'strerror', None) or e
        raise WeightsError(f'{directory} cannot be written: {words}. Nothing half-written was left.') from e
    return dataclasses.replace(written, directory=str(directory))


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes, in the order of names: what weights are, in whatever file they came."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f'{name} {str(tensor.dtype).partition(".")[2]} {list(tensor.shape)}\n'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _as_written(parsed: Checkpoint, net: torch.nn.Module, dtype: Optional[torch.dtype]) -> Dict[str, Tensor]:
    """Return every weight of the model, cast; a dense checkpoint's final norm gets its initial values."""
    tensors = {}
    for key in net.state_dict():
        tensor = parsed.state_dict.get(key)
        if tensor is None:
            like = next(iter(parsed.state_dict.values()))
            make = torch.ones if key.endswith('weight') else torch.zeros
            tensor = make(net.get_parameter(key).shape, dtype=like.dtype)
        if dtype is not None and tensor.dtype != dtype:
            cast = tensor.to(dtype)
            if not torch.isfinite(cast).all():
                raise CheckpointError(
                    f'`{parsed.source_keys.get(key, key)}` has values beyond the range of {dtype}. Use bf16 or fp32.')
            tensor = cast
        tensors[key] = tensor.contiguous()
    return tensors


def _write_config(net: Any, path: Path, parsed: Checkpoint, facts: Conversion, license: Optional[str]) -> None:
    """Write config.json as timm does, with the facts beside it.

    timm would repeat `num_classes` in the model's arguments, where transformers trips over it.
    """
    cfg = dict(parsed.pretrained_cfg, num_classes=net.num_classes)
    if parsed.origin == 'vit-pytorch':
        cfg.update(origin_url='https://github.com/lucidrains/vit-pytorch')
    if license:
        cfg['license'] = license
    labels = {'label_names': parsed.label_names} if len(parsed.label_names or ()) == net.num_classes > 0 else {}
    args = {key: value for key, value in facts.args.items() if key != 'num_classes'}
    net._model_args = {**net._model_args, **args}  # kept as JSON can hold them; before 1.0.31 timm records none
    args = {key: net._model_args[key] for key in args}
    config = dict(pretrained_cfg=cfg, timm_crossformer=facts.to_json(), **labels)
    older: Any = path  # timm said str, and before 1.0.31 wanted a Path
    save_config_for_hf(net, older, model_config=config, model_args=args)
    config = json.loads(path.read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)
    config['pretrained_cfg'].pop('tag', None)
    config['pretrained_cfg'].pop('label_names', None)  # of the variant's own weights
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


_ORIGINS = {
    'official': 'the official implementation, https://github.com/cheerss/CrossFormer',
    'vit-pytorch': 'vit-pytorch, https://github.com/lucidrains/vit-pytorch',
    'birder': 'birder, https://gitlab.com/birder/birder',
    'native': 'timm_crossformer',
}


def model_card(facts: Conversion, name: str, license: Optional[str] = None) -> str:
    """Write the README.md of a repository of weights."""
    dense = (
        'This is the backbone of a detector or segmenter: it has no classifier, and its final norm is at its initial '
        'values. Use it with `features_only=True`.\n\n') if facts.dense else ''
    features = ', features_only=True' if facts.dense else ''
    args = ', '.join(f'{key}={value}' for key, value in facts.args.items()) or 'the defaults of the variant'
    return (
        '---\n'
        'tags:\n- image-classification\n- timm\n- crossformer\n'
        'library_name: timm\n'
        f'license: {license or "unknown"}\n'
        '---\n'
        f'# {name}\n\n'
        f'`{facts.model}` for [timm](https://github.com/huggingface/pytorch-image-models), '
        f'{facts.params:,} parameters, {facts.num_classes} classes. The import registers the model with timm:\n\n'
        '```python\n'
        'import timm\n'
        'import timm_crossformer  # pip install timm_crossformer\n\n'
        f"model = timm.create_model('hf-hub:OWNER/{name}', pretrained=True{features}).eval()\n"
        '```\n\n'
        f'{dense}'
        '## Origin\n\n'
        f'- Trained with {_ORIGINS[facts.origin]}.\n'
        f'- Converted from `{facts.source}`, sha256 `{facts.source_sha256}`.\n'
        f'- Model arguments: {args}.\n'
        f'- Licence of the weights: {license or "not stated by the origin"}.\n\n'
        '## File\n\n'
        f'`{WEIGHTS_NAME}`: {facts.size:,} bytes, {facts.dtype}, sha256 `{facts.sha256}`. '
        'Check a copy with `timm-crossformer verify DIR`.\n')
