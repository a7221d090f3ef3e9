"""Files and folders that appear whole or not at all, locks between processes, bars for people who wait."""
import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Union

from filelock import FileLock
from tqdm import tqdm

__all__ = ['PathLike', 'Progress', 'bar', 'hash_file', 'locked', 'new_files', 'printable', 'sync', 'with_stderr']

PathLike = Union[str, Path]
Progress = Callable[[int], Any]  # called with the number of bytes just processed


def hash_file(path: PathLike, progress: Optional[Progress] = None) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def printable(text: Any) -> str:
    """Return a text that every file can hold: bytes of a file name that are no UTF-8 are written as numbers."""
    return str(text).encode('utf-8', 'backslashreplace').decode()


def sync(path: Path) -> None:
    """Have the system write a file or directory to disk, where it can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no directories
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_files(directory: Path) -> Iterator[Path]:
    """Yield a temporary folder; when all is well, what is in it is synced to disk and moved into a directory.

    A new directory appears complete or not at all. One that exists, by a link or as a mount point too, stays itself;
    its files are replaced whole, in reverse alphabetical order, and others left alone.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    exists = directory.is_dir()
    where = directory if exists else directory.parent  # a file system of its own takes no files of another
    temporary = Path(tempfile.mkdtemp(prefix=f'.{directory.name}.', dir=where))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for path in temporary.iterdir():
            path.chmod(0o666 & ~umask)
            sync(path)
        temporary.chmod(0o777 & ~umask)
        sync(temporary)
        if exists:
            for path in sorted(temporary.iterdir(), reverse=True):
                path.replace(directory / path.name)
        else:
            temporary.replace(directory)
        sync(where)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes and threads; the file is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        try:
            yield
        finally:  # others ask for the name anew in every try, and so find the next file
            with contextlib.suppress(OSError):  # Windows removes no open file, its lock does
                path.unlink()


@contextlib.contextmanager
def with_stderr() -> Iterator[None]:
    """Have a stderr to write to: services and windowed applications have None."""
    with contextlib.ExitStack() as stack:
        if sys.stderr is None:
            null = stack.enter_context(open(os.devnull, 'w', encoding='utf-8'))
            stack.enter_context(contextlib.redirect_stderr(null))
        yield


@contextlib.contextmanager
def bar(title: str, total: Optional[int], unit: str = 'B', delay: float = 0.) -> Iterator[Any]:
    """Show a bar on stderr if it is a terminal; what is yielded has `update(n)`."""
    with with_stderr(), tqdm(
            total=total, desc=printable(title), unit=unit, unit_scale=unit == 'B', disable=None, leave=False,
            delay=delay) as shown:
        yield shown
