"""Where weights come from and go to: the Hub, the files of this package, and directories that timm can load."""
import hashlib
import json
import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import Tensor

from .._timm import save_config_for_hf
from ..variants import VARIANTS
from .fitting import Checkpoint, CheckpointError, check_fit, check_values, parse_state_dict, read_checkpoint
from .transfer import FetchError, Progress, sync
from .transfer import hash_file as sha256

WEIGHTS_NAME, CONFIG_NAME, CARD_NAME = 'model.safetensors', 'config.json', 'README.md'
_FETCHED = (WEIGHTS_NAME, 'pytorch_model.bin')  # what timm looks for in a repository, in this order


def weights_dir() -> Path:
    """Return the directory of the manifest and the bundled weights: in the package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / 'weights'
    return inside if inside.is_dir() else Path(__file__).parents[2] / 'weights'


def manifest() -> List[Dict[str, Any]]:
    """Return a record of every published set of weights."""
    path = weights_dir() / 'manifest.json'
    return json.loads(path.read_text(encoding='utf-8'))['weights'] if path.is_file() else []


def bundled_weights() -> Iterator[Tuple[str, str, Dict[str, Any]]]:
    """Yield tag, file and pretrained cfg of the weights that come with the package."""
    for record in manifest():
        path = weights_dir() / (record.get('bundled') or '')
        if path.is_file():
            cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in record['cfg'].items()}
            yield record['tag'], str(path), cfg


def _repository(cfg: Dict[str, Any]) -> Optional[str]:
    """Return the repository that timm will read with this pretrained cfg, None if it reads something else."""
    if cfg.get('source') == 'hf-hub':
        return cfg.get('hf_hub_id')
    if cfg.get('source') == 'local-dir' or cfg.get('state_dict') or cfg.get('file'):
        return None
    return cfg.get('hf_hub_id')


def fetch_weights(cfg: Dict[str, Any], cache_dir: Optional[Union[str, Path]] = None) -> Optional[Path]:
    """Bring the weights of a pretrained cfg into the Hub cache, where timm then finds them.

    A file that arrives is compared with the sha256 the Hub names it by, and with the manifest's where it has one.

    Raises:
        FetchError: They cannot be had, or are damaged. It says what was asked, what happened, and what to do.
    """
    repo = _repository(cfg)
    if not repo:
        return None
    name, _, revision = repo.partition('@')
    with explain_failure(cfg, Exception):
        for filename in (cfg['hf_hub_filename'],) if cfg.get('hf_hub_filename') else _FETCHED:
            try:
                return hub_file(name, filename, revision or None, cache_dir)
            except EntryNotFoundError:  # offline as well: what is not in the cache
                if filename == _FETCHED[-1] or cfg.get('hf_hub_filename'):
                    raise
    return None


def hub_file(
        repo: str,
        filename: str,
        revision: Optional[str] = None,
        cache_dir: Optional[Union[str, Path]] = None,
) -> Path:
    """Return a file of the Hub in its client's cache, fetched and checked if need be."""
    pins = [
        source['sha256'] for record in manifest() for source in record['sources']
        if source['kind'] == 'hub' and source['sha256'] and (source['id'], source['file']) == (repo, filename)
    ]
    cached = huggingface_hub.try_to_load_from_cache(repo, filename, cache_dir, revision)
    if isinstance(cached, str):
        _check_hash(Path(cached), filename, pins)
        return Path(cached)
    path = Path(huggingface_hub.hf_hub_download(
        repo, filename, revision=revision, cache_dir=cache_dir, library_name='timm_crossformer'))
    blob = path.resolve().name
    _check_hash(path, filename, [*([blob] if re.fullmatch('[0-9a-f]{64}', blob) else []), *pins])
    return path


def file_to_read(cfg: Dict[str, Any], fetched: Optional[Path] = None) -> Optional[Path]:
    """Return the file of a pretrained cfg that we read in timm's place: any but safetensors that is named alone."""
    if cfg.get('source') in ('hf-hub', 'local-dir') or cfg.get('state_dict') or cfg.get('custom_load'):
        return None
    path = Path(cfg['file']) if cfg.get('file') else fetched
    return path if path and path.suffix != '.safetensors' else None


def _check_hash(path: Path, filename: str, wanted: List[str]) -> None:
    """Compare a file of the Hub's cache with what it must be; delete it if it differs."""
    blob = path.resolve()
    got = sha256(blob) if wanted else ''
    for expected in wanted:
        if got != expected:
            path.unlink()
            blob.unlink(missing_ok=True)
            raise FetchError(f'{filename} arrived damaged: its sha256 is {got}, expected {expected}. It was deleted')


@contextmanager
def explain_failure(cfg: Dict[str, Any], errors: Any = (SafetensorError, OSError)) -> Iterator[None]:
    """Turn whatever prevents weights from being fetched or read into one message with the remedy."""
    repo = _repository(cfg)
    try:
        yield
    except CheckpointError:
        raise
    except errors as e:
        if not repo:
            if isinstance(e, SafetensorError):
                raise CheckpointError(f'{cfg["file"]}: no intact safetensors file, {e}. Convert it again.') from e
            raise
        filename = cfg.get('hf_hub_filename') or WEIGHTS_NAME
        raise FetchError(
            f'{cfg.get("architecture") or "The model"} needs weights that could not be fetched.\n'
            f'  Asked:    {filename} of {repo} at {huggingface_hub.constants.ENDPOINT}\n'
            f'  Happened: {describe(e)}\n'
            'Either of these helps:\n'
            '  timm-crossformer convert FILE DIR   # a checkpoint you hold; then create_model("local-dir:DIR")\n'
            f'  hf download {repo.replace("@", " --revision ")} {filename}   # by hand; its output says more\n'
            'Without `pretrained=True` the model starts from random weights.') from e


def describe(error: BaseException) -> str:
    """Say what happened in a line: the error's first sentences, and those of its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = ' '.join(lines[:3]).rstrip('.')
    return reason if error.__cause__ is None else f'{reason} ({describe(error.__cause__)})'


def convert_file(
        source: Union[str, Path],
        directory: Union[str, Path],
        model: Optional[str] = None,
        group_size: Any = None,
        lda_group_size: Any = None,
        interval: Any = None,
        lda_grouping: Optional[str] = None,
        num_classes: Optional[int] = None,
        dtype: Optional[torch.dtype] = None,
        container: Optional[str] = None,
        expected_sha256: Optional[str] = None,
        license: Optional[str] = None,
        overwrite: bool = False,
        progress: Optional[Progress] = None,
        default_groups: Optional[Dict[str, Any]] = None,
        inspect: Optional[Callable[[Checkpoint, str], Dict[str, Any]]] = None,
) -> Dict[str, Any]:
    """Convert a checkpoint file into a directory that timm and the Hub can load.

    A new directory appears complete or not at all; in an existing one files are replaced whole, the weights first.

    Args:
        source: Checkpoint file.
        directory: Directory to write.
        model: Variant; None infers it from the shapes.
        group_size: As in `CrossFormer`, instead of the origin's default; likewise the next three.
        num_classes: 0 leaves the classifier out; another number must be that of the checkpoint.
        dtype: Of the weights written; None keeps the source's.
        container: Key of the state dict in the checkpoint; None finds it.
        expected_sha256: Hash, or its beginning, that the source must have.
        license: Licence of the weights for the model card.
        overwrite: Replace the files of an existing directory.
        progress: Called with the number of bytes just processed, twice the size of the source in all.
        default_groups: Arguments for a checkpoint that does not name its groups itself.
        inspect: Called with what was read and its digest before anything is written; may refuse it by an error, and
            returns facts to be recorded with the others.

    Returns:
        What was read and written: model, arguments, hashes, sizes.

    Raises:
        CheckpointError: The checkpoint cannot be used; nothing was written.
    """
    source, directory = Path(source), Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f'The output needs to be a directory, {directory} is a file. Name another one.')
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise CheckpointError(f'{directory} has files already. Name another directory, or pass `--overwrite`.')
    with ThreadPoolExecutor() as pool:  # hashing reads the file a second time: beside the first, not after it
        hashing = pool.submit(sha256, source, progress) if source.is_file() else None
        parsed = parse_state_dict(read_checkpoint(source), container)
        check_values(parsed)
        source_hash = hashing.result() if hashing else ''
    if expected_sha256 is not None and not (expected_sha256 and source_hash.startswith(expected_sha256.lower())):
        raise CheckpointError(
            f'{source} needs a sha256 beginning with {expected_sha256!r}, got {source_hash}. Fetch it again.')
    name, args = _variant(parsed, model)
    options = dict(
        group_size=group_size, lda_group_size=lda_group_size, interval=interval, lda_grouping=lda_grouping)
    options = {key: value for key, value in options.items() if value is not None}
    in_file = bool(parsed.trained_groups(len(parsed.arguments()['depths'])))
    args.update({**({} if in_file else default_groups or {}), **options})
    dense = parsed.dense
    if num_classes is not None:
        _set_classes(parsed, args, num_classes)
    net = timm.create_model(name, device='meta', **args)
    check_fit(parsed, net, complete=not dense)
    digest = tensor_digest(parsed.state_dict)
    more = inspect(parsed, digest) if inspect is not None else {}
    tensors = _as_written(parsed, net, dtype)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _new_directory(directory) as temporary:
        weights = temporary / WEIGHTS_NAME
        save_file(tensors, weights, metadata={'format': 'pt'})
        del tensors
        if progress is not None:
            progress(source.stat().st_size)
        with ThreadPoolExecutor() as pool:
            syncing = pool.submit(sync, weights)
            written_hash = sha256(weights)
            syncing.result()
        facts = {
            'model': name,
            'args': args,
            'origin': parsed.origin,
            'dense': dense,
            'container': parsed.container,
            'prefix': parsed.prefix,
            'left_out': len(parsed.left_out),
            'groups_from': 'option' if options else 'checkpoint' if in_file else 'default',
            'num_classes': net.num_classes,
            'params': sum(p.numel() for p in net.parameters()),
            'dtype': str(dtype or next(iter(parsed.state_dict.values())).dtype).replace('torch.', ''),
            'source': source.name,
            'source_sha256': source_hash,
            'sha256': written_hash,
            'size': weights.stat().st_size,
            'digest': digest,
            **more,
        }
        _write_config(net, temporary / CONFIG_NAME, parsed, facts, license)
        (temporary / CARD_NAME).write_text(model_card(facts, directory.resolve().name, license), encoding='utf-8')
    return dict(facts, directory=str(directory))


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes, in the order of names: what weights are, in whatever file they came."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f'{name} {str(tensor.dtype).partition(".")[2]} {list(tensor.shape)}\n'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _variant(parsed: Checkpoint, model: Optional[str]) -> Tuple[str, Dict[str, Any]]:
    """Return variant and arguments; a variant that was named gets no arguments that change its weights."""
    name, args = parsed.variant()
    if model is None:
        return name, args
    if model not in VARIANTS:
        raise CheckpointError(f'`model` is one of {", ".join(VARIANTS)}, got {model!r}.')
    free = ('num_classes', 'in_chans', 'group_size', 'interval')
    return model, {key: value for key, value in args.items() if model == name or key in free}


def _set_classes(parsed: Checkpoint, args: Dict[str, Any], num_classes: int) -> None:
    head = parsed.state_dict.get('head.fc.weight')
    have = 0 if head is None else head.shape[0]
    if num_classes not in (0, have):
        raise CheckpointError(
            f'`num_classes` leaves the classifier out (0) or names the number of classes there are ({have}), got '
            f'{num_classes}. To train on other classes, convert as it is and create the model with `num_classes`.')
    if num_classes == 0:
        for key in ('head.fc.weight', 'head.fc.bias'):
            parsed.state_dict.pop(key, None)
        args['num_classes'] = 0


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


@contextmanager
def _new_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory that takes the final name, synced to disk, when all is well."""
    temporary = Path(tempfile.mkdtemp(prefix=f'.{directory.name}.', dir=directory.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for path in temporary.iterdir():
            path.chmod(0o666 & ~umask)
            sync(path)
        temporary.chmod(0o777 & ~umask)
        sync(temporary)
        if directory.is_dir() and any(directory.iterdir()):
            for path in sorted(temporary.iterdir(), reverse=True):  # the weights first
                path.replace(directory / path.name)
            temporary.rmdir()
        else:
            temporary.replace(directory)
        sync(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_config(net: Any, path: Path, parsed: Checkpoint, facts: Dict[str, Any], license: Optional[str]) -> None:
    """Write config.json as timm does, with the facts beside it.

    timm would repeat `num_classes` in the model's arguments, where transformers trips over it.
    """
    cfg = dict(parsed.pretrained_cfg, num_classes=net.num_classes)
    if parsed.origin == 'vit-pytorch':
        cfg.update(origin_url='https://github.com/lucidrains/vit-pytorch')
    if license:
        cfg['license'] = license
    labels = {'label_names': parsed.label_names} if len(parsed.label_names or ()) == net.num_classes > 0 else {}
    save_config_for_hf(net, str(path), model_config=dict(pretrained_cfg=cfg, timm_crossformer=facts, **labels))
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


def model_card(facts: Dict[str, Any], name: str, license: Optional[str] = None) -> str:
    """Write the README.md of a repository of weights."""
    dense = (
        'This is the backbone of a detector or segmenter: it has no classifier, and its final norm is at its initial '
        'values. Use it with `features_only=True`.\n\n') if facts['dense'] else ''
    features = ', features_only=True' if facts['dense'] else ''
    args = ', '.join(f'{key}={value}' for key, value in facts['args'].items()) or 'the defaults of the variant'
    return (
        '---\n'
        'tags:\n- image-classification\n- timm\n- crossformer\n'
        'library_name: timm\n'
        f'license: {license or "unknown"}\n'
        '---\n'
        f'# {name}\n\n'
        f'`{facts["model"]}` for [timm](https://github.com/huggingface/pytorch-image-models), '
        f'{facts["params"]:,} parameters, {facts["num_classes"]} classes. The import registers the model with timm:\n\n'
        '```python\n'
        'import timm\n'
        'import timm_crossformer  # pip install timm_crossformer\n\n'
        f"model = timm.create_model('hf-hub:OWNER/{name}', pretrained=True{features}).eval()\n"
        '```\n\n'
        f'{dense}'
        '## Origin\n\n'
        f'- Trained with {_ORIGINS[facts["origin"]]}.\n'
        f'- Converted from `{facts["source"]}`, sha256 `{facts["source_sha256"]}`.\n'
        f'- Model arguments: {args}.\n'
        f'- Licence of the weights: {license or "not stated by the origin"}.\n\n'
        '## File\n\n'
        f'`{WEIGHTS_NAME}`: {facts["size"]:,} bytes, {facts["dtype"]}, sha256 `{facts["sha256"]}`. '
        'Check a copy with `timm-crossformer verify DIR`.\n')


def verify_directory(
        directory: Union[str, Path],
        against: Optional[Union[str, Path]] = None,
        photo: bool = True,
) -> List[Dict[str, Any]]:
    """Check a directory that `convert_file` or timm wrote.

    Args:
        directory: With model.safetensors and config.json.
        against: A checkpoint whose weights and outputs it must reproduce, in the precision it was written in.
        photo: Have a classifier of 1000 classes, ImageNet's then, name the cat on a photo.

    Returns:
        A record {check, ok, detail} per check, up to the first that makes further ones impossible.
    """
    directory = Path(directory)
    checks: List[Dict[str, Any]] = []

    def check(name: str, ok: bool, detail: str) -> bool:
        checks.append({'check': name, 'ok': bool(ok), 'detail': detail})
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
    got = sha256(weights)
    check('sha256', recorded in (None, got), got if recorded else f'{got} (none recorded to compare with)')
    if recorded and recorded != got:
        checks[-1]['detail'] = f'got {got}, recorded {recorded}'
    try:
        parsed = parse_state_dict(read_checkpoint(weights))
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


def _check_directory(directory: Path) -> None:
    """Raise CheckpointError with the first check that a directory fails."""
    for check in verify_directory(directory, photo=False):  # others have 1000 classes, too
        if not check['ok']:
            raise CheckpointError(
                f'{directory} fails the check of {check["check"]}: {check["detail"].rstrip(".")}. Convert it again.')


_CATS = range(281, 286)  # ImageNet-1k's classes of domestic cats


def photo_path() -> Path:
    """Return the photo of a cat: among the package's weights, or with the examples in a checkout."""
    inside = weights_dir() / 'photo.jpg'
    return inside if inside.is_file() else Path(__file__).parents[2] / 'examples' / 'photo.jpg'


def _names_the_cat(net: Any) -> Tuple[bool, str]:
    """Tell whether the five likeliest classes of the photo hold a cat, which chance finds once in 40 times."""
    if net.in_chans != 3:
        return True, f'not tried with {net.in_chans} channels'
    if not photo_path().is_file():
        return False, 'the photo of the package is missing: install it again'
    with Image.open(photo_path()) as image:
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
    other = parse_state_dict(read_checkpoint(source))
    if 'head.fc.weight' not in parsed.state_dict:
        _set_classes(other, {}, 0)
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


def push_directory(
        directory: Union[str, Path],
        repo_id: str,
        private: bool = False,
        dry_run: bool = False,
) -> Dict[str, Any]:
    """Upload a converted directory to the Hub, after checking its weights against its config.

    Args:
        directory: What `convert_file` wrote.
        repo_id: 'OWNER/NAME', created if need be.
        private: Create it for its owner only.
        dry_run: Check, and upload nothing.

    Returns:
        Repository, files with sizes, and the address of the commit (None in a dry run).

    Raises:
        CheckpointError: The directory fails a check.
        FetchError: The Hub refused, or cannot be reached.
    """
    directory = Path(directory)
    _check_directory(directory)
    files = [path for path in (directory / n for n in (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME)) if path.is_file()]
    result: Dict[str, Any] = {
        'repo_id': repo_id, 'files': {path.name: path.stat().st_size for path in files}, 'commit': None}
    if dry_run:
        return result
    api = huggingface_hub.HfApi(library_name='timm_crossformer')
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        operations = [huggingface_hub.CommitOperationAdd(path.name, _card_bytes(path, repo_id)) for path in files]
        commit = api.create_commit(repo_id, operations, commit_message=f'Add {directory.name} by timm_crossformer')
    except Exception as e:  # the client's errors have many classes
        raise FetchError(
            f'{repo_id} was not written at {huggingface_hub.constants.ENDPOINT}: {describe(e)}. '
            'Log in with `hf auth login`, and check that you may write there.') from e
    return dict(result, repo_id=repo_id, commit=str(commit.commit_url))


def _card_bytes(path: Path, repo_id: str) -> Union[str, bytes]:
    """Fill the repository's name into the card; other files go as they are."""
    if path.name != CARD_NAME:
        return str(path)
    return re.sub(r'hf-hub:OWNER/[^\']+', f'hf-hub:{repo_id}', path.read_text(encoding='utf-8')).encode()


def load_model(model: Optional[str] = None, weights: Optional[Union[str, Path]] = None, **kwargs: Any) -> Any:
    """Create a model with weights, for evaluation.

    Args:
        model: Name for `timm.create_model`; None infers it from the weights.
        weights: A directory that timm can load, or a checkpoint file of any origin; None takes the model's own.
        kwargs: Further arguments of the model.
    """
    if weights is None:
        if model is None:
            raise ValueError('A model needs a name or weights. Pass `--model` or `--weights`.')
        return timm.create_model(model, pretrained=True, **kwargs).eval()
    weights = Path(weights)
    if weights.is_dir():
        if model is not None:
            raise ValueError('A directory of weights names its model itself. Leave `--model` out.')
        try:
            return timm.create_model(f'local-dir:{weights}', pretrained=True, **kwargs).eval()
        except Exception:  # a directory may be wrong in any way
            _check_directory(weights)
            raise
    parsed = parse_state_dict(read_checkpoint(weights))
    name, args = _variant(parsed, model)
    shown = parsed.arguments()
    cfg = dict(state_dict=parsed.state_dict, num_classes=shown['num_classes'], **parsed.pretrained_cfg)
    cfg['label_names'] = tuple(parsed.label_names) if parsed.label_names else None  # not those of the variant's weights
    default = timm.models.resolve_pretrained_cfg(name)
    cfg['input_size'] = (shown['in_chans'], *cfg.get('input_size', default.input_size)[1:])
    if parsed.dense and not kwargs.get('features_only'):
        raise CheckpointError(f'{weights} has no classifier. Use `features`, or weights of a classifier.')
    net: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg, **{**args, **kwargs}).eval()
    net.pretrained_cfg.pop('state_dict', None)
    return net
