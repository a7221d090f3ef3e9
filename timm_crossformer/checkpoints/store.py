"""Published weights by name: where they are, how they get into the local store, and what is known of them.

A tag's record in weights/manifest.json lists its sources. The first that answers with the right weights fills the
store, a directory per tag that timm can load; afterwards nothing is asked any more. No source states a hash, so the
first weights that came are remembered by a digest, and others under the same name are an error.
"""
import contextlib
import datetime
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import huggingface_hub
import timm
from safetensors.torch import load_file

from ..variants import TAG_ARGS, VARIANTS
from .fitting import Checkpoint, CheckpointError
from .hub import CONFIG_NAME, WEIGHTS_NAME, convert_file, describe, fetch_weights, hub_file, manifest
from .transfer import FetchError, download, download_drive, hash_file, lock

__all__ = ['cross_check', 'fetch', 'find', 'places', 'stored', 'tag_of']

FLOWVISION_URL = (
    'https://oneflow-public.oss-cn-beijing.aliyuncs.com/model_zoo/flowvision/classification/CrossFormer')

_logger = logging.getLogger(__name__)

PathLike = Union[str, Path]


class RefusedError(FetchError, CheckpointError):
    """Weights that arrived and were refused, from every source there is."""


class OtherWeightsError(CheckpointError):
    """Weights under a known name that are not the known ones."""


def store_dir(cache_dir: Optional[PathLike] = None) -> Path:
    """Return the store: `cache_dir`, else TIMM_CROSSFORMER_CACHE, else a folder of the user's cache."""
    root = cache_dir or os.environ.get('TIMM_CROSSFORMER_CACHE')
    if root:
        return Path(root).expanduser()
    return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'timm_crossformer'


def find(tag: str) -> Dict[str, Any]:
    """Return the record of a tag.

    Raises:
        RuntimeError: There is none; where timm has words for it, in timm's.
    """
    variant, _, name = tag.partition('.')
    records = manifest()
    if not name:  # the variant's default
        tag = next((record['tag'] for record in records if record['tag'].partition('.')[0] == variant), tag)
    for record in records:
        if record['tag'] == tag:
            return record
    if variant not in VARIANTS:
        raise RuntimeError(f'Unknown model ({variant})')
    raise RuntimeError(f'Invalid pretrained tag ({name}) for {variant}' if name else f'No weights for {variant}')


def tag_of(cfg: Dict[str, Any]) -> Optional[str]:
    """Return the tag whose weights timm would take from the store with this pretrained cfg, None if it has others."""
    elsewhere = any(cfg.get(key) for key in ('state_dict', 'file', 'hf_hub_id', 'source'))
    scheme, _, tag = str(cfg.get('url') or '').partition(':')
    return tag if scheme == 'timm-crossformer' and not elsewhere else None


def stored(tag: str, cache_dir: Optional[PathLike] = None) -> Optional[Dict[str, Any]]:
    """Return what is known of a tag's weights in the store, None if they are not there or not whole."""
    directory = store_dir(cache_dir) / tag
    facts = _recorded(directory)
    weights = directory / WEIGHTS_NAME
    if not facts or not weights.is_file() or weights.stat().st_size != facts.get('size'):
        return None
    return dict(facts, weights=str(weights), directory=str(directory))


def _check_stored(facts: Dict[str, Any]) -> None:
    """Raise CheckpointError if weights in the store are no longer what was put there."""
    got = hash_file(facts['weights'])
    if got != facts['sha256']:
        raise CheckpointError(
            f'{facts["weights"]} is damaged: its sha256 is {got}, it was stored with {facts["sha256"]}. Fetch it again '
            f'by `timm-crossformer fetch {facts["tag"]} --force`.')


def _recorded(directory: Path) -> Dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((directory / CONFIG_NAME).read_text(encoding='utf-8')).get('timm_crossformer') or {}
    return {}


def places(record: Dict[str, Any], cache_dir: Optional[PathLike] = None) -> List[str]:
    """Say where the weights of a record are: 'package', 'store', the hosts, or 'browser'."""
    if any(source['kind'] == 'package' for source in record['sources']):
        return ['package']
    here = ['store'] if stored(record['tag'], cache_dir) else []
    return here + _hosts(record) or ['browser']


def _hosts(record: Dict[str, Any]) -> List[str]:
    """Return the kinds of sources of a record that can be asked."""
    return list(dict.fromkeys(source['kind'] for source in _with_account(record) if source['kind'] in _FETCHERS))


def _with_account(record: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return the sources of a record, the Hub account of the environment first."""
    account = os.environ.get('TIMM_CROSSFORMER_HUB')
    own = record['origin'] == 'official'
    return ([{'kind': 'hub', 'id': f'{account}/{record["tag"]}', 'file': WEIGHTS_NAME, 'revision': None,
              'sha256': None, 'size': None}] if account and own else []) + record['sources']


def fetch(
        tag: str,
        source: Optional[str] = None,
        file: Optional[PathLike] = None,
        force: bool = False,
        cache_dir: Optional[PathLike] = None,
) -> Dict[str, Any]:
    """Bring a tag's weights into the store, unless they are there.

    Processes that want the same weights wait for the first of them.

    Args:
        tag: As in `timm-crossformer list`.
        source: The one kind of source to ask, 'hub', 'drive' or 'flowvision'; None asks all in turn.
        file: A checkpoint to take instead of asking anybody.
        force: Fetch again what is in the store.
        cache_dir: Store to use.

    Returns:
        What is recorded of the weights: directory, source, hashes, sizes, date.

    Raises:
        FetchError: No source has them. The message says what each answered, and how to go on by hand.
        CheckpointError: What came is not what the tag stands for, or not what came before.
        ValueError: The tag has no such source, or weights of its own that no file replaces.
    """
    record = find(tag)
    tag = record['tag']
    hosts = _hosts(record)
    if source is not None and source not in hosts:
        known = ', '.join(hosts) or 'no host'
        raise ValueError(f'{tag} can be fetched from {known}, got {source!r}.{_by_hand(record)}')
    if record['bundled'] or record['origin'] == 'birder':
        if file is not None:
            raise ValueError(
                f'{tag} stands for one published file, which needs no other in its place, got {str(file)!r}. '
                '`timm-crossformer convert` makes a directory of a checkpoint.')
        if record['bundled']:
            return {'tag': tag, 'directory': None, 'fetched_from': 'package'}
        return _fetch_birder(record, cache_dir)
    if not force and file is None:
        facts = stored(tag, cache_dir)
        if facts:
            _check_stored(facts)
            return facts
    root = store_dir(cache_dir)
    with _held(root, tag):
        facts = None if force or file is not None else stored(tag, cache_dir)
        if facts:
            return facts  # another process was first
        if file is not None:
            return _store(record, Path(file), {'fetched_from': 'file'}, root)
        return _fetch_in_turn(record, source, root)


def _fetch_in_turn(record: Dict[str, Any], source: Optional[str], root: Path) -> Dict[str, Any]:
    failures: List[str] = []
    refused = False
    offline = _is_offline()
    for entry in _with_account(record):
        if entry['kind'] not in _FETCHERS or source not in (None, entry['kind']) or (offline and not _is_cached(entry)):
            continue
        try:
            with _temporary(root, record['tag']) as folder:
                path, address = _FETCHERS[entry['kind']](entry, folder)
                return _store(record, path, {'fetched_from': entry['kind'], 'address': address}, root)
        except OtherWeightsError:
            raise
        except (FetchError, CheckpointError) as e:
            refused = refused or isinstance(e, CheckpointError)
            failures.append(f'{entry["kind"]}: {e}')
            _logger.warning('%s: %s', record['tag'], failures[-1])
    if not failures:
        failures = [f'{_OFFLINE}, so nothing was asked' if offline else 'no host has them']
    raise (RefusedError if refused else FetchError)(_failure(record, failures))


def _from_hub(entry: Dict[str, Any], folder: Path) -> Tuple[Path, str]:
    repo, name = entry['id'], entry['file']
    try:
        return hub_file(repo, name, entry['revision']), f'{huggingface_hub.constants.ENDPOINT}/{repo}'
    except FetchError:
        raise
    except Exception as e:  # the client's errors have many classes
        raise FetchError(f'{name} of {repo} at {huggingface_hub.constants.ENDPOINT}: {describe(e)}.') from e


def _from_drive(entry: Dict[str, Any], folder: Path) -> Tuple[Path, str]:
    path = download_drive(entry['id'], folder / 'weights.pth', entry['size'], entry['sha256'])
    return path, f'https://drive.google.com/file/d/{entry["id"]}/view'


def _from_flowvision(entry: Dict[str, Any], folder: Path) -> Tuple[Path, str]:
    url = f'{(os.environ.get("TIMM_CROSSFORMER_FLOWVISION_URL") or FLOWVISION_URL).rstrip("/")}/{entry["name"]}'
    return download(url, folder / entry['name'], entry['size'], entry['sha256']), url


_FETCHERS: Dict[str, Callable[..., Tuple[Path, str]]] = {
    'hub': _from_hub, 'drive': _from_drive, 'flowvision': _from_flowvision}


def _store(record: Dict[str, Any], path: Path, origin: Dict[str, Any], root: Path) -> Dict[str, Any]:
    """Check a checkpoint against its record, and convert it into the store."""
    tag = record['tag']
    variant, _, name = tag.partition('.')
    directory = root / tag

    def inspect(parsed: Checkpoint, digest: str) -> Dict[str, Any]:
        _check_kind(record, parsed)
        known = _recorded(directory)
        for owner, wanted in ((f'{known.get("fetched_from")} on {known.get("date")}', known.get('digest')),
                              ('the manifest', record['digest'])):
            if wanted and wanted != digest:
                raise OtherWeightsError(
                    f'{tag}: {origin["fetched_from"]} gives other weights than are known by this name: digest '
                    f'{digest}, known {wanted} from {owner}. If the known ones are wrong, delete {directory}.')
        return {
            'tag': tag, **origin, 'digest': digest, 'source_size': path.stat().st_size,
            'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        }

    facts = convert_file(
        path,
        directory,
        model=variant,
        default_groups=TAG_ARGS.get(name),
        overwrite=True,
        inspect=inspect,
    )
    return dict(facts, weights=str(directory / WEIGHTS_NAME))


def _check_kind(record: Dict[str, Any], parsed: Checkpoint) -> None:
    """Refuse a backbone for a classifier and the other way round, and other classes or channels."""
    if parsed.dense != record['dense']:
        kinds = ['a classifier', 'the backbone of a detector or segmenter']
        raise CheckpointError(
            f'{record["tag"]} stands for {kinds[record["dense"]]}, this is {kinds[parsed.dense]}. Use another file.')
    args = parsed.arguments()
    wanted = {'num_classes': 0 if record['dense'] else 1000, 'in_chans': 3}
    wrong = [f'{key}={args[key]} instead of {value}' for key, value in wanted.items() if args[key] != value]
    if wrong:
        raise CheckpointError(f'{record["tag"]}: this checkpoint has {" and ".join(wrong)}. Use another file.')


def _fetch_birder(record: Dict[str, Any], cache_dir: Optional[PathLike]) -> Dict[str, Any]:
    cfg = timm.models.resolve_pretrained_cfg(*record['tag'].split('.')).to_dict()
    weights = str(fetch_weights(cfg, cache_dir))
    return {'tag': record['tag'], 'directory': None, 'weights': weights, 'fetched_from': 'hub'}


def cross_check(tag: str) -> Dict[str, Any]:
    """Fetch a tag from all its hosts, compare tensor by tensor, and return the sources with their hashes.

    Nothing is stored.

    Raises:
        FetchError: Fewer than two hosts have the tag, or one does not answer.
        CheckpointError: The weights differ; the message says where.
    """
    record = find(tag)
    hosts = [entry for entry in record['sources'] if entry['kind'] in _FETCHERS]
    if len(hosts) < 2:
        raise FetchError(f'{tag} has no second host to compare with.')
    if _is_offline():
        raise FetchError(_failure(record, [f'{_OFFLINE}, so nothing was asked']))
    root = store_dir()
    sources, weights, digests = [], [], []
    with _held(root, record['tag']), _temporary(root, record['tag']) as folder:
        for entry in hosts:
            try:
                path, address = _FETCHERS[entry['kind']](entry, folder)
            except FetchError as e:
                raise FetchError(f'{record["tag"]}: {entry["kind"]}: {e}') from e
            facts = _store(record, path, {'fetched_from': entry['kind'], 'address': address}, folder / entry['kind'])
            sources.append(dict(entry, sha256=facts['source_sha256'], size=facts['source_size']))
            weights.append(load_file(facts['weights']))
            digests.append(facts['digest'])
    for other, entry in zip(weights[1:], hosts[1:], strict=True):
        differing = [key for key, tensor in weights[0].items()
                     if tensor.dtype != other[key].dtype or not tensor.equal(other[key])]
        if differing:
            worst = max((weights[0][key].double() - other[key].double()).abs().max().item() for key in differing)
            raise CheckpointError(
                f'{record["tag"]}: {hosts[0]["kind"]} and {entry["kind"]} differ in {len(differing)} of {len(other)} '
                f'weights, by {worst:.3g} at most: {", ".join(sorted(differing)[:20])}. Digests {digests[0]} and '
                f'{digests[hosts.index(entry)]}.')
    return {'tag': record['tag'], 'tensors': len(weights[0]), 'digest': digests[0], 'sources': sources}


def _failure(record: Dict[str, Any], failures: Sequence[str]) -> str:
    happened = '\n'.join(f'  {failure}' for failure in failures)
    return (
        f'{record["tag"]} needs weights that could not be fetched.\n{happened}{_by_hand(record)}\n'
        'Without `pretrained=True` the model starts from random weights.')


def _by_hand(record: Dict[str, Any]) -> str:
    """Say how to go on with a browser, if there is a page to open."""
    pages = [
        f'  https://drive.google.com/file/d/{entry["id"]}/view' if entry['kind'] == 'drive' else
        f'  {entry["url"]}   # code {entry["code"]}'
        for entry in record['sources'] if entry['kind'] in ('drive', 'browser')]
    if not pages:
        return ''
    note = f'\n{record["notes"]}' if record['notes'] and 'link' in record['notes'] else ''
    return (
        f'\nOpen a page in a browser and save the file:\n{chr(10).join(pages)}{note}\nThen:\n'
        f'  timm-crossformer fetch {record["tag"]} --from FILE')


_OFFLINE = 'HF_HUB_OFFLINE is set'


def _is_cached(entry: Dict[str, Any]) -> bool:
    """Tell whether the Hub's client has a file already."""
    return entry['kind'] == 'hub' and isinstance(
        huggingface_hub.try_to_load_from_cache(entry['id'], entry['file'], revision=entry['revision']), str)


def _is_offline() -> bool:
    """Tell whether the environment forbids requests, now or when huggingface_hub was imported."""
    value = os.environ.get('HF_HUB_OFFLINE', '').upper()
    return value in ('1', 'ON', 'YES', 'TRUE') or bool(huggingface_hub.constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def _temporary(root: Path, tag: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f'.{tag}.', dir=root, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _held(root: Path, tag: str) -> Iterator[None]:
    """Hold a tag of the store alone, cleared of what killed processes left; remove the store if nothing got into it."""
    new = not root.exists()
    try:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock(root / f'.{tag}.lock'))
            except OSError as e:
                raise FetchError(
                    f'{tag} needs a store that can be written, got {root}: {e.strerror or e}. Name another folder by '
                    '`cache_dir` or TIMM_CROSSFORMER_CACHE.') from e
            for left in root.glob(f'.{tag}.*/'):
                shutil.rmtree(left, ignore_errors=True)
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):
                root.rmdir()
