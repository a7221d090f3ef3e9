"""Published weights by name: where they are, how they get into the local store, and what is known of them.

A tag's record in weights/manifest.json lists its sources. The first that answers with the right weights fills the
store, a directory per tag that timm can load; afterwards nothing is asked any more. No source states a hash, so the
first weights that came are remembered by a digest, and others under the same name are an error.
"""
import contextlib
import dataclasses
import datetime
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Type

import huggingface_hub
import timm
from safetensors.torch import load_file

from .errors import CheckpointError, FetchError, OtherWeightsError, WeightsError, host_of
from .files import PathLike, hash_file, locked
from .hub import describe, endpoint, fetch_weights, hub_file
from .parsing import Checkpoint
from .planning import plan_model
from .records import Conversion, Record, Source, find
from .transfer import DRIVE_URL, download, download_drive
from .writing import CONFIG_NAME, WEIGHTS_NAME, open_source, tensor_digest, write_directory

__all__ = ['CrossCheck', 'Fetched', 'cross_check', 'fetch', 'places', 'stored', 'tag_of']

FLOWVISION_URL = (
    'https://oneflow-public.oss-cn-beijing.aliyuncs.com/model_zoo/flowvision/classification/CrossFormer')

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Fetched:
    """Weights that are here.

    Attributes:
        tag: Their name.
        fetched_from: 'package', or a kind of source, or 'file'.
        weights: Path of the file; None if it comes with the package.
        conversion: What is recorded of them, if they are in the store.
    """

    tag: str
    fetched_from: str
    weights: Optional[str] = None
    conversion: Optional[Conversion] = None

    def to_json(self) -> Dict[str, Any]:
        """Return what is known, as plain data."""
        data: Dict[str, Any] = {'tag': self.tag, 'directory': None, 'fetched_from': self.fetched_from}
        if self.weights:
            data['weights'] = self.weights
        return {**data, **(self.conversion.to_json() if self.conversion else {})}


class CrossCheck(NamedTuple):
    """What two hosts agree in: the tag, the number of tensors, their digest, and the sources with their hashes."""

    tag: str
    tensors: int
    digest: str
    sources: Tuple[Source, ...]


def store_dir(cache_dir: Optional[PathLike] = None) -> Path:
    """Return the store: `cache_dir`, else TIMM_CROSSFORMER_CACHE, else a folder of the user's cache.

    Raises:
        FetchError: There is no home to have a cache.
    """
    root = cache_dir or os.environ.get('TIMM_CROSSFORMER_CACHE')
    path = Path(root) if root else Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'timm_crossformer'
    try:
        return path.expanduser()
    except RuntimeError as e:
        raise FetchError(
            f'Weights need a store, and {path} needs a home directory, which this user has not. Name a folder by '
            '`cache_dir` or TIMM_CROSSFORMER_CACHE.') from e


def tag_of(cfg: Dict[str, Any]) -> Optional[str]:
    """Return the tag whose weights timm would take from the store with this pretrained cfg, None if it has others."""
    elsewhere = any(cfg.get(key) for key in ('state_dict', 'file', 'hf_hub_id', 'source'))
    scheme, _, tag = str(cfg.get('url') or '').partition(':')
    return tag if scheme == 'timm-crossformer' and not elsewhere else None


def stored(tag: str, cache_dir: Optional[PathLike] = None) -> Optional[Conversion]:
    """Return what is known of a tag's weights in the store, None if they are not there or not whole."""
    known = _recorded(store_dir(cache_dir) / tag)
    weights = Path(known.weights) if known else None
    return known if known and weights and weights.is_file() and weights.stat().st_size == known.size else None


def _recorded(directory: Path) -> Optional[Conversion]:
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        config = json.loads((directory / CONFIG_NAME).read_text(encoding='utf-8'))
        return Conversion.from_json(config['timm_crossformer'], directory=str(directory))
    return None


def _check_stored(known: Conversion) -> None:
    """Raise CheckpointError if weights in the store are no longer what was put there."""
    got = hash_file(known.weights)
    if got != known.sha256:
        raise CheckpointError(
            f'{known.weights} is damaged: its sha256 is {got}, it was stored with {known.sha256}. Fetch it again '
            f'by `timm-crossformer fetch {known.tag} --force`.')


def places(record: Record, cache_dir: Optional[PathLike] = None) -> List[str]:
    """Say where the weights of a record are: 'package', 'store', the hosts, or 'browser'."""
    if record.bundled:
        return ['package']
    here: List[str] = []
    with contextlib.suppress(FetchError):  # no home, no store
        here = ['store'] if stored(record.tag, cache_dir) else []
    return here + _hosts(record) or ['browser']


def _hosts(record: Record) -> List[str]:
    """Return the kinds of sources of a record that can be asked."""
    return list(dict.fromkeys(source.kind for source in _with_account(record)))


def _with_account(record: Record) -> List[Source]:
    """Return the sources of a record that can be asked, the Hub account of the environment first."""
    account = os.environ.get('TIMM_CROSSFORMER_HUB')
    asked = account and record.origin == 'official'
    own = [Source('hub', id=f'{account}/{record.tag}', file=WEIGHTS_NAME)] if asked else []
    return own + [source for source in record.sources if source.kind in _FETCHERS]


def fetch(
        tag: str,
        source: Optional[str] = None,
        file: Optional[PathLike] = None,
        force: bool = False,
        cache_dir: Optional[PathLike] = None,
) -> Fetched:
    """Bring a tag's weights into the store, unless they are there.

    Processes that want the same weights wait for the first of them.

    Args:
        tag: As in `timm-crossformer list`.
        source: The one kind of source to ask, 'hub', 'drive' or 'flowvision'; None asks all in turn.
        file: A checkpoint to take instead of asking anybody.
        force: Fetch again what is in the store.
        cache_dir: Store to use.

    Raises:
        FetchError: No source has them. The message says what each answered, and how to go on by hand.
        CheckpointError: What came is not what the tag stands for, or not what came before.
        ValueError: The tag has no such source, or weights of its own that no file replaces.
    """
    record = find(tag)
    hosts = _hosts(record)
    if source is not None and source not in hosts:
        known = ', '.join(hosts) or 'no host'
        raise ValueError(f'{record.tag} can be fetched from {known}, got {source!r}.{_by_hand(record)}')
    if record.bundled or record.origin == 'birder':
        if file is not None:
            raise ValueError(
                f'{record.tag} stands for one published file, which needs no other in its place, got {str(file)!r}. '
                '`timm-crossformer convert` makes a directory of a checkpoint.')
        if record.bundled:
            return Fetched(record.tag, 'package')
        variant, _, name = record.tag.partition('.')
        cfg = timm.models.resolve_pretrained_cfg(variant, name).to_dict()
        return Fetched(record.tag, 'hub', str(fetch_weights(cfg, cache_dir)))
    anew = force or file is not None
    here = None if anew else stored(record.tag, cache_dir)
    if here:
        _check_stored(here)
        return _of_store(here)
    root = store_dir(cache_dir)
    with _held(root, record.tag):
        here = None if anew else stored(record.tag, cache_dir)  # another process was first
        return _of_store(here or _into_store(record, source, None if file is None else Path(file), root))


def _of_store(known: Conversion) -> Fetched:
    return Fetched(str(known.tag), str(known.fetched_from), known.weights, known)


def _into_store(record: Record, source: Optional[str], file: Optional[Path], root: Path) -> Conversion:
    """Take a file, or ask the sources in turn."""
    if file is not None:
        return _store(record, file, 'file', None, root)
    failures: List[str] = []
    raised: Type[WeightsError] = FetchError
    offline = _is_offline()
    for entry in _with_account(record):
        if source not in (None, entry.kind) or (offline and not _is_cached(entry)):
            continue
        try:
            with _temporary(root, record.tag) as folder:
                path, address = _FETCHERS[entry.kind](entry, folder)
                return _store(record, path, entry.kind, address, root)
        except OtherWeightsError:
            raise
        except (FetchError, CheckpointError) as e:
            raised = CheckpointError if isinstance(e, CheckpointError) else raised
            failures.append(f'{entry.kind}: {e}')
            _logger.warning('%s: %s', record.tag, failures[-1])
    if not failures:
        failures = [f'{_OFFLINE}, so nothing was asked' if offline else 'no host has them']
    raise raised(_failure(record, failures))


def _from_hub(entry: Source, folder: Path) -> Tuple[Path, str]:
    try:
        return hub_file(entry.id, entry.file, entry.revision), f'{endpoint()}/{entry.id}'
    except FetchError:
        raise
    except Exception as e:  # the client's errors have many classes
        raise FetchError(f'{entry.file} of {entry.id} at {endpoint()}: {describe(e)}.') from None


def _from_drive(entry: Source, folder: Path) -> Tuple[Path, str]:
    mirror = os.environ.get('TIMM_CROSSFORMER_DRIVE_URL') or DRIVE_URL
    path = download_drive(entry.id, folder / 'weights.pth', entry.size, entry.sha256)
    return path, entry.page() if mirror == DRIVE_URL else f'{host_of(mirror)} for {entry.page()}'


def _from_flowvision(entry: Source, folder: Path) -> Tuple[Path, str]:
    base = os.environ.get('TIMM_CROSSFORMER_FLOWVISION_URL') or FLOWVISION_URL
    url = f'{base.rstrip("/")}/{entry.name}'
    path = download(url, folder / entry.name, entry.size, entry.sha256)
    page = f'{FLOWVISION_URL}/{entry.name}'
    return path, page if url == page else f'{host_of(url)} for {page}'


_FETCHERS: Dict[str, Callable[..., Tuple[Path, str]]] = {
    'hub': _from_hub, 'drive': _from_drive, 'flowvision': _from_flowvision}


def _store(record: Record, path: Path, fetched_from: str, address: Optional[str], root: Path) -> Conversion:
    """Check a checkpoint against its record, and convert it into the store."""
    directory = root / record.tag
    opened = open_source(path)
    _check_kind(record, opened.parsed)
    digest, known = tensor_digest(opened.parsed.state_dict), _recorded(directory)
    for owner, wanted in ((f'{known.fetched_from} on {known.date}' if known else '', known and known.digest),
                          ('the manifest', record.digest)):
        if wanted and wanted != digest:
            raise OtherWeightsError(
                f'{record.tag}: {fetched_from} gives other weights than are known by this name: digest {digest}, known '
                f'{wanted} from {owner}. If the known ones are wrong, delete {directory}.')
    plan = plan_model(opened.parsed, record.variant, default_groups=record.groups)
    return write_directory(
        opened, plan, directory, tag=record.tag, fetched_from=fetched_from, address=address,
        source_size=path.stat().st_size, date=datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'))


def _check_kind(record: Record, parsed: Checkpoint) -> None:
    """Refuse a backbone for a classifier and the other way round, and other classes or channels."""
    if parsed.dense != record.dense:
        kinds = ['a classifier', 'the backbone of a detector or segmenter']
        raise CheckpointError(
            f'{record.tag} stands for {kinds[record.dense]}, this is {kinds[parsed.dense]}. Use another file.')
    args = parsed.arguments()
    wanted = {'num_classes': 0 if record.dense else 1000, 'in_chans': 3}
    wrong = [f'{key}={args[key]} instead of {value}' for key, value in wanted.items() if args[key] != value]
    if wrong:
        raise CheckpointError(f'{record.tag}: this checkpoint has {" and ".join(wrong)}. Use another file.')


def cross_check(tag: str) -> CrossCheck:
    """Fetch a tag from all its hosts, compare tensor by tensor, and return the sources with their hashes.

    Nothing is stored.

    Raises:
        FetchError: Fewer than two hosts have the tag, or one does not answer.
        CheckpointError: The weights differ; the message says where.
    """
    record = find(tag)
    hosts = [source for source in record.sources if source.kind in _FETCHERS]
    if len(hosts) < 2:
        raise FetchError(f'{tag} has no second host to compare with.')
    if _is_offline():
        raise FetchError(_failure(record, [f'{_OFFLINE}, so nothing was asked']))
    root = store_dir()
    sources, weights, digests = [], [], []
    with _held(root, record.tag), _temporary(root, record.tag) as folder:
        for entry in hosts:
            try:
                path, address = _FETCHERS[entry.kind](entry, folder)
            except FetchError as e:
                raise FetchError(f'{record.tag}: {entry.kind}: {e}') from None
            written = _store(record, path, entry.kind, address, folder / entry.kind)
            sources.append(dataclasses.replace(entry, sha256=written.source_sha256, size=written.source_size))
            weights.append(load_file(written.weights))
            digests.append(written.digest)
    for other, entry, digest in zip(weights[1:], hosts[1:], digests[1:], strict=True):
        differing = [key for key, tensor in weights[0].items()
                     if tensor.dtype != other[key].dtype or not tensor.equal(other[key])]
        if differing:
            worst = max((weights[0][key].double() - other[key].double()).abs().max().item() for key in differing)
            raise CheckpointError(
                f'{record.tag}: {hosts[0].kind} and {entry.kind} differ in {len(differing)} of {len(other)} '
                f'weights, by {worst:.3g} at most: {", ".join(sorted(differing)[:20])}. Digests {digests[0]} and '
                f'{digest}.')
    return CrossCheck(record.tag, len(weights[0]), digests[0], tuple(sources))


def _failure(record: Record, failures: Sequence[str]) -> str:
    happened = '\n'.join(f'  {failure}' for failure in failures)
    return (
        f'{record.tag} needs weights that could not be fetched.\n{happened}{_by_hand(record)}\n'
        'Without `pretrained=True` the model starts from random weights.')


def _by_hand(record: Record) -> str:
    """Say how to go on with a browser, if there is a page to open."""
    pages = [f'  {source.page()}' for source in record.sources if source.page()]
    if not pages:
        return ''
    note = f'\n{record.notes}' if 'link' in record.notes else ''
    return (
        f'\nOpen a page in a browser and save the file:\n{chr(10).join(pages)}{note}\nThen:\n'
        f'  timm-crossformer fetch {record.tag} --from FILE')


_OFFLINE = 'HF_HUB_OFFLINE is set'


def _is_cached(entry: Source) -> bool:
    """Tell whether the Hub's client has a file already."""
    return entry.kind == 'hub' and isinstance(
        huggingface_hub.try_to_load_from_cache(entry.id, entry.file, revision=entry.revision), str)


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
                stack.enter_context(locked(root / f'.{tag}.lock'))
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
