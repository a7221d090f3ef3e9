"""Weights from and to the Hugging Face Hub, by its own client."""
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Union

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError

from .errors import CheckpointError, FetchError, host_of
from .files import PathLike, hash_file, with_stderr
from .records import manifest
from .verifying import check_directory
from .writing import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME

__all__ = ['endpoint', 'explain_failure', 'fetch_weights', 'file_to_read', 'hub_file', 'push_directory']

_FETCHED = (WEIGHTS_NAME, 'pytorch_model.bin')  # what timm looks for in a repository, in this order
_TRIES = 3


def endpoint() -> str:
    """Return the Hub's address as messages and records name it."""
    return host_of(huggingface_hub.constants.ENDPOINT)


def _repository(cfg: Dict[str, Any]) -> Optional[str]:
    """Return the repository that timm will read with this pretrained cfg, None if it reads something else."""
    if cfg.get('source') == 'hf-hub':
        return cfg.get('hf_hub_id')
    if cfg.get('source') == 'local-dir' or cfg.get('state_dict') or cfg.get('file'):
        return None
    return cfg.get('hf_hub_id')


def fetch_weights(cfg: Dict[str, Any], cache_dir: Optional[PathLike] = None) -> Optional[Path]:
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
        cache_dir: Optional[PathLike] = None,
) -> Path:
    """Return a file of the Hub in its client's cache, fetched and checked if need be."""
    pins = [
        source.sha256 for record in manifest() for source in record.sources
        if source.sha256 and (source.kind, source.id, source.file) == ('hub', repo, filename)
    ]
    cached = huggingface_hub.try_to_load_from_cache(repo, filename, cache_dir, revision)
    if isinstance(cached, str):
        _check_hash(Path(cached), filename, pins)
        return Path(cached)
    for attempt in range(_TRIES):
        try:
            with with_stderr():
                path = Path(huggingface_hub.hf_hub_download(
                    repo, filename, revision=revision, cache_dir=cache_dir, library_name='timm_crossformer'))
            break
        except (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled):
            raise
        except OSError:  # a broken connection; before version 1 the client does not take it up by itself
            if attempt + 1 == _TRIES:
                raise
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
    got = hash_file(blob) if wanted else ''
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
            f'  Asked:    {filename} of {repo} at {endpoint()}\n'
            f'  Happened: {describe(e)}\n'
            'Either of these helps:\n'
            '  timm-crossformer convert FILE DIR   # a checkpoint you hold; then create_model("local-dir:DIR")\n'
            f'  hf download {repo.replace("@", " --revision ")} {filename}   # by hand; its output says more\n'
            'Without `pretrained=True` the model starts from random weights.') from None


def describe(error: BaseException) -> str:
    """Say what happened in a line: the error's first sentences, and those of its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = ' '.join(lines[:3]).rstrip('.')
    return reason if error.__cause__ is None else f'{reason} ({describe(error.__cause__)})'


def push_directory(
        directory: PathLike,
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
    check_directory(directory)
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
            f'{repo_id} was not written at {endpoint()}: {describe(e)}. '
            'Log in with `hf auth login`, and check that you may write there.') from None
    return dict(result, repo_id=repo_id, commit=str(commit.commit_url))


def _card_bytes(path: Path, repo_id: str) -> Union[str, bytes]:
    """Fill the repository's name into the card; other files go as they are."""
    if path.name != CARD_NAME:
        return str(path)
    return re.sub(r'hf-hub:OWNER/[^\']+', f'hf-hub:{repo_id}', path.read_text(encoding='utf-8')).encode()
