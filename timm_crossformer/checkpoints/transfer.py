"""Fetch a file over HTTP, from Google Drive or any other host, whole or not at all. Standard library only."""
import contextlib
import hashlib
import http.client
import http.cookiejar
import importlib.util
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

__all__ = ['FetchError', 'Progress', 'download', 'download_drive', 'hash_file', 'lock', 'sync']

DRIVE_URL = 'https://drive.usercontent.google.com/download'
TIMEOUT = 30.  # seconds without a byte
TRIES = 5
WAIT = .5  # seconds before the second try, doubled before each further one
MAX_SIZE = 4 * 2 ** 30  # bytes; the largest detector with its optimizer has half of that
_MAX_PAGE = 2 ** 20
_CHUNK = 2 ** 20

Progress = Callable[[int], Any]  # called with the number of bytes just processed


class FetchError(RuntimeError):
    """Weights that could not be fetched."""


class _Retry(Exception):
    """A failure that may pass."""


def download(url: str, path: Path, size: Optional[int] = None, sha256: Optional[str] = None) -> Path:
    """Fetch a file. It appears complete, synced to disk, or not at all; a connection that breaks is taken up again.

    Shows a bar if stderr is a terminal.

    Args:
        url: http or https.
        path: File to write.
        size: Bytes it must have, if known.
        sha256: Hash it must have, if known.

    Raises:
        FetchError: It cannot be had, or is not what was asked for. The message says which.
    """
    return _Transfer(path, size, sha256).run(_with_query(url, {}))


def download_drive(file_id: str, path: Path, size: Optional[int] = None, sha256: Optional[str] = None) -> Path:
    """Fetch a public file of Google Drive, as `download` does.

    The page that warns of files too large to scan for viruses is answered once. Where no file comes, the package gdown
    tries next if it is installed. The environment variable TIMM_CROSSFORMER_DRIVE_URL replaces Drive's address.
    """
    url = os.environ.get('TIMM_CROSSFORMER_DRIVE_URL') or DRIVE_URL
    try:
        query = {'id': file_id, 'export': 'download', 'confirm': 't'}
        return _Transfer(path, size, sha256, drive=True).run(_with_query(url, query))
    except FetchError as e:
        if importlib.util.find_spec('gdown') is None:
            raise
        try:
            _download_gdown(file_id, path)
            _check(path, size, sha256)
        except Exception as second:
            path.unlink(missing_ok=True)
            raise FetchError(f'{e} gdown: {second}') from e
        return path


def _download_gdown(file_id: str, path: Path) -> None:
    import gdown

    if gdown.download(id=file_id, output=str(path), quiet=not sys.stderr.isatty(), use_cookies=False) is None:
        raise FetchError('it fetched nothing.')


def _refuse_page(path: Path) -> None:
    with open(path, 'rb') as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b'<!doctype html', b'<html')):
        raise FetchError(f'A page came instead of a file: {_page_title(start)!r}.')


def _with_query(url: str, query: Mapping[str, str]) -> str:
    if urllib.parse.urlsplit(url).scheme not in ('http', 'https'):
        raise FetchError(f'An address begins with http:// or https://, got {url}.')
    return f'{url}{"&" if "?" in url else "?"}{urllib.parse.urlencode(query)}' if query else url


class _StaySafe(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Follow a redirection, but not from https to what everybody on the way could change."""
        if req.full_url.startswith('https:') and not newurl.startswith('https:'):
            raise FetchError(f'{urllib.parse.urlsplit(req.full_url).netloc}: it leads away from https, to {newurl}.')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Transfer:
    """One file on its way: the bytes that are here already, and how often it was tried."""

    def __init__(self, path: Path, size: Optional[int], sha256: Optional[str], drive: bool = False):
        self.path, self.size, self.sha256, self.drive = path, size, sha256, drive
        self.partial = path.with_name(f'{path.name}.partial')
        self.received, self.total = 0, size  # bytes
        self.tag: Optional[str] = None  # the host's name for this content
        self.opener = urllib.request.build_opener(  # proxies by environment
            _StaySafe(), urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
        self.opener.addheaders = [('User-Agent', 'Mozilla/5.0 (compatible; timm_crossformer)')]

    def run(self, url: str) -> Path:
        host = urllib.parse.urlsplit(url).netloc
        self.partial.unlink(missing_ok=True)
        try:
            with _bar(self) as self.show:
                for attempt in range(TRIES):
                    try:
                        self._receive(url)
                        break
                    except _Retry as e:
                        if attempt + 1 == TRIES:
                            raise FetchError(f'{host}: {e}, {TRIES} times.') from e
                        time.sleep(WAIT * 2 ** attempt)
            _check(self.partial, self.size, self.sha256)
            with open(self.partial, 'rb') as file:
                os.fsync(file.fileno())
            self.partial.replace(self.path)
            sync(self.path.parent)
        finally:
            self.partial.unlink(missing_ok=True)
        return self.path

    def _receive(self, url: str, answered: bool = False) -> None:
        """Receive what is missing."""
        have = self.partial.stat().st_size if self.partial.exists() else 0
        headers = {'Range': f'bytes={have}-'} if have else {}
        if have and self.tag:
            headers['If-Range'] = self.tag
        try:
            with self.opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
                kind = answer.headers.get_content_type()
                named = 'attachment' in answer.headers.get('Content-Disposition', '')
                if kind in ('text/html', 'application/xhtml+xml') and not named:
                    page = answer.read(_MAX_PAGE).decode('utf-8', 'replace')
                    form = _confirmation(page, answer.url) if self.drive and not answered else None
                    if form is None:
                        raise _page_error(page, answer.url, self.drive)
                else:
                    self._store(answer, have)
                    return
        except urllib.error.HTTPError as e:
            with e:
                raise self._http_error(e, url) from e
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
            reason = getattr(e, 'reason', None) or e
            words = f'no network connection ({str(reason) or type(reason).__name__})'
            if isinstance(reason, socket.gaierror):  # no name server, or no such name: neither passes soon
                raise FetchError(f'{urllib.parse.urlsplit(url).netloc}: {words}.') from e
            raise _Retry(words) from e
        self._receive(form, answered=True)

    def _http_error(self, error: urllib.error.HTTPError, url: str) -> Exception:
        host = urllib.parse.urlsplit(url).netloc
        if error.code in (408, 425, 429, 500, 502, 503, 504):
            return _Retry(f'the host answers {error.code} {error.reason}')
        if error.code == 416:
            self.partial.unlink(missing_ok=True)
            return _Retry('the host has another file than before')
        if error.code in (404, 410):
            return FetchError(f'{host}: the file is not there any more ({error.code} {error.reason}).')
        if error.code in (401, 403):
            page = error.read(_MAX_PAGE).decode('utf-8', 'replace')
            if self.drive and _is_quota(page):
                return _page_error(page, url, True)
            return FetchError(f'{host}: no permission to read the file ({error.code} {error.reason}).')
        return FetchError(f'{host}: the host answers {error.code} {error.reason}.')

    def _store(self, answer: Any, have: int) -> None:
        """Append to what is there, or begin anew if the host does."""
        begin, total = 0, None
        length = answer.headers.get('Content-Length', '')
        if answer.status == 206:
            span = re.fullmatch(r'bytes (\d+)-\d+/(\d+|\*)', answer.headers.get('Content-Range', '').strip())
            if not span or int(span[1]) != have:
                self.partial.unlink(missing_ok=True)
                raise _Retry('the host sent another part than asked for')
            begin, total = have, int(span[2]) if span[2] != '*' else None
        elif length.isdigit():
            total = int(length)
        self.tag = answer.headers.get('ETag')
        self.tag = None if self.tag and self.tag.startswith('W/') else self.tag
        if total is not None and (total > MAX_SIZE or (self.size is not None and total != self.size)):
            wanted = f'{self.size} bytes' if self.size is not None else f'at most {MAX_SIZE} bytes'
            host = urllib.parse.urlsplit(answer.url).netloc
            raise FetchError(f'{host}: a file of {wanted} was expected, got {total}.')
        self.total = total
        self.received = begin
        with open(self.partial, 'ab' if begin else 'wb') as file:
            while True:
                broken: Optional[Exception] = None
                try:
                    chunk = answer.read(_CHUNK)
                except http.client.IncompleteRead as e:
                    chunk, broken = e.partial, e
                except OSError as e:  # reset, no route any more, a record of TLS that does not fit
                    chunk, broken = b'', e
                file.write(chunk)
                self.received += len(chunk)
                self.show()
                if self.received > MAX_SIZE:
                    raise FetchError(f'The host sends more than {MAX_SIZE} bytes.')
                if broken or not chunk:
                    break
        if broken or (total is not None and self.received != total):
            of = '' if total is None else f' of {total}'
            raise _Retry(f'the connection broke after {self.received} bytes{of}') from broken


def _check(path: Path, size: Optional[int], sha256: Optional[str]) -> None:
    got = path.stat().st_size
    if got == 0 or (size is not None and got != size):
        raise FetchError(f'The file arrived damaged: it has {got} bytes, {"more" if size is None else size} expected.')
    _refuse_page(path)
    if sha256 is None:
        return
    digest = hash_file(path)
    if digest != sha256:
        raise FetchError(f'The file arrived damaged: its sha256 is {digest}, expected {sha256}. It was deleted.')


def hash_file(path: Union[str, Path], progress: Optional[Progress] = None) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


# ---- Google Drive's pages


class _Form(HTMLParser):
    """Finds the form with the id `download-form`, its address and its hidden inputs."""

    def __init__(self):
        super().__init__()
        self.action: Optional[str] = None
        self.inputs: Dict[str, str] = {}
        self._inside = False

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        """Keep what belongs to the form."""
        values = dict(attrs)
        if tag == 'form' and values.get('id') == 'download-form':
            self.action, self._inside = values.get('action') or '', True
        elif tag == 'input' and self._inside and values.get('name'):
            self.inputs[str(values['name'])] = values.get('value') or ''

    def handle_endtag(self, tag: str) -> None:
        """Leave the form."""
        self._inside = self._inside and tag != 'form'


def _confirmation(page: str, url: str) -> Optional[str]:
    """Return the address that the warning page leads to, None if it is another page."""
    form = _Form()
    form.feed(page)
    if form.action is None or 'id' not in form.inputs:
        return None
    here = urllib.parse.urlsplit(url)
    there = urllib.parse.urlsplit(urllib.parse.urljoin(url, form.action))
    google = '.google.com'
    known = there.netloc == here.netloc or (
        there.scheme == 'https' and f'.{there.hostname}'.endswith(google) and f'.{here.hostname}'.endswith(google))
    base = there if known else here  # a mirror stands for the host its pages name
    return _with_query(urllib.parse.urlunsplit((base.scheme, base.netloc, base.path, '', '')), form.inputs)


def _page_title(page: Any) -> str:
    text = page.decode('utf-8', 'replace') if isinstance(page, bytes) else page
    found = re.search(r'<title[^>]*>([^<]{0,200})', text, re.IGNORECASE)
    return ' '.join(found[1].split()) if found else 'without a title'


def _is_quota(page: str) -> bool:
    return re.search(r'quota exceeded|too many users have (?:viewed or downloaded|recently)', page, re.I) is not None


def _page_error(page: str, url: str, drive: bool) -> FetchError:
    address = urllib.parse.urlsplit(url)
    host, title = address.netloc, _page_title(page)
    if drive and _is_quota(page):
        return FetchError(
            f'{host}: the quota of this file is used up ({title!r}): too many users fetched it. '
            'Try again within 24 hours.')
    if drive and (re.search(r'access denied|you need access|need permission|sign in', title, re.I) or (
            'ServiceLogin' in address.path or host.startswith('accounts.'))):
        return FetchError(f'{host}: no permission to read the file ({title!r}).')
    return FetchError(f'{host}: a page came instead of a file: {title!r}.')


# ---- files


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the file is gone afterwards."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process removed an empty folder meanwhile
            continue
        _lock_handle(handle)
        try:
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                break
        except FileNotFoundError:  # its last owner removed it while we waited
            pass
        os.close(handle)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        os.close(handle)


def _lock_handle(handle: int) -> None:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        while True:
            with contextlib.suppress(OSError):
                msvcrt.locking(handle, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]  # Windows only
                return
    fcntl.flock(handle, fcntl.LOCK_EX)


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
def _bar(transfer: _Transfer) -> Iterator[Callable[[], None]]:
    """Yield what shows how much of a file is here, on a line of stderr if that is a terminal."""
    shown = 0.

    def show() -> None:
        nonlocal shown
        if sys.stderr.isatty() and time.monotonic() - shown > 0.2:
            shown = time.monotonic()
            of = f' of {transfer.total / 1e6:.0f}' if transfer.total else ''
            sys.stderr.write(f'\r{transfer.path.name}: {transfer.received / 1e6:.0f}{of} MB')
            sys.stderr.flush()

    try:
        yield show
    finally:
        if shown:
            sys.stderr.write('\r\x1b[K')
