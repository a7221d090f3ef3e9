"""Fetch a file over HTTP, from Google Drive or any other host, whole or not at all.

The client is the one that huggingface_hub has: proxies, certificates and credentials in addresses are its business.
"""
import contextlib
import http.client
import os
import re
import socket
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple
from urllib.parse import urlencode, urljoin, urlsplit, urlunsplit

from huggingface_hub.utils import get_session

from .errors import FetchError, host_of
from .files import bar, hash_file, sync

__all__ = ['DRIVE_URL', 'download', 'download_drive']

DRIVE_URL = 'https://drive.usercontent.google.com/download'
TIMEOUT = 30.  # seconds without a byte
TRIES = 5
WAIT = .5  # seconds before the second try, doubled before each further one
MAX_SIZE = 4 * 2 ** 30  # bytes; the largest detector with its optimizer has half of that
_MAX_PAGE = 2 ** 20
_CHUNK = 2 ** 16  # bytes; what a broken connection loses at most
_REDIRECTIONS = 10


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

    The page that warns of files too large to scan for viruses is answered once. The environment variable
    TIMM_CROSSFORMER_DRIVE_URL replaces Drive's address.
    """
    url = os.environ.get('TIMM_CROSSFORMER_DRIVE_URL') or DRIVE_URL
    query = {'id': file_id, 'export': 'download', 'confirm': 't'}
    return _Transfer(path, size, sha256, drive=True).run(_with_query(url, query))


def _with_query(url: str, query: Mapping[str, str]) -> str:
    if urlsplit(url).scheme not in ('http', 'https') or not urlsplit(url).hostname:
        raise FetchError(f'An address begins with http:// or https:// and a host, got {url}.')
    return f'{url}{"&" if "?" in url else "?"}{urlencode(query)}' if query else url


def _name(url: str) -> str:
    """Return the host of an address as messages name it."""
    return host_of(url).partition('://')[2]


@contextlib.contextmanager
def _ask(url: str, headers: Dict[str, str]) -> Iterator[Tuple[Any, Iterator[bytes]]]:
    """Yield an answer and its body; the session is that of requests before huggingface_hub 1, of httpx since."""
    session: Any = get_session()
    if callable(session.stream):  # of requests, it is a setting
        with session.stream('GET', url, headers=headers, timeout=TIMEOUT, follow_redirects=False) as answer:
            yield answer, answer.iter_bytes(_CHUNK)
    else:
        with session.get(url, headers=headers, timeout=TIMEOUT, allow_redirects=False, stream=True) as answer:
            yield answer, answer.iter_content(_CHUNK)


@contextlib.contextmanager
def _answer(url: str, headers: Dict[str, str]) -> Iterator[Tuple[Any, Iterator[bytes]]]:
    """Yield the answer at the end of redirections, none of which leads from https to what everybody could change."""
    with contextlib.ExitStack() as stack:
        for _ in range(_REDIRECTIONS):
            try:
                answer, chunks = stack.enter_context(_ask(url, headers))
            except Exception as e:  # of requests, urllib3, httpx or the system
                raise _network_error(e, url) from None
            where = answer.headers.get('Location')
            if answer.status_code not in (301, 302, 303, 307, 308) or not where:
                yield answer, chunks
                return
            stack.close()
            target = urljoin(url, where)
            if url.startswith('https:') and not target.startswith('https:'):
                raise FetchError(f'{_name(url)}: it leads away from https, to {host_of(target)}.')
            url = target
    raise FetchError(f'{_name(url)}: it leads from one address to another, {_REDIRECTIONS} times.')


def _network_error(error: BaseException, url: str) -> Exception:
    """Tell what passes from what does not, in the words of the cause: the client's own hold addresses."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    words = f'no network connection ({str(error) or type(error).__name__})'
    if isinstance(error, socket.gaierror):  # no name server, or no such name: neither passes soon
        return FetchError(f'{_name(url)}: {words}.')
    return _Retry(words)


def _parts(chunks: Iterator[bytes], limit: Optional[int] = None) -> Iterator[bytes]:
    """Yield a body up to a limit; raise _Retry where the connection breaks."""
    received = 0
    while limit is None or received < limit:
        try:
            chunk = next(chunks, None)
        except Exception as e:  # reset, no route any more, a record of TLS that does not fit, too few bytes
            raise _Retry('the connection broke') from e
        if chunk is None:
            return
        received += len(chunk)
        yield chunk


class _Transfer:
    """One file on its way: the bytes that are here already, and how often it was tried."""

    def __init__(self, path: Path, size: Optional[int], sha256: Optional[str], drive: bool = False):
        self.path, self.size, self.sha256, self.drive = path, size, sha256, drive
        self.partial = path.with_name(f'{path.name}.partial')
        self.tag: Optional[str] = None  # the host's name for this content

    def run(self, url: str) -> Path:
        self.partial.unlink(missing_ok=True)
        try:
            with bar(self.path.name, self.size) as self.bar:
                for attempt in range(TRIES):
                    try:
                        self._receive(url)
                        break
                    except _Retry as e:
                        if attempt + 1 == TRIES:
                            raise FetchError(f'{_name(url)}: {e}, {TRIES} times.') from None
                        time.sleep(WAIT * 2 ** attempt)
            _check(self.partial, self.size, self.sha256)
            sync(self.partial)
            self.partial.replace(self.path)
            sync(self.path.parent)
        finally:
            self.partial.unlink(missing_ok=True)
        return self.path

    def _receive(self, url: str, answered: bool = False) -> None:
        """Receive what is missing."""
        have = self.partial.stat().st_size if self.partial.exists() else 0
        headers = {'User-Agent': 'Mozilla/5.0 (compatible; timm_crossformer)', 'Accept-Encoding': 'identity'}
        if have:
            headers.update({'Range': f'bytes={have}-'}, **({'If-Range': self.tag} if self.tag else {}))
        with _answer(url, headers) as (answer, chunks):
            here = str(answer.url)
            kind = answer.headers.get('Content-Type', '').partition(';')[0].strip().lower()
            page = kind in ('text/html', 'application/xhtml+xml') and (
                'attachment' not in answer.headers.get('Content-Disposition', ''))
            if answer.status_code < 400 and not page:
                self._store(answer, chunks, here, have)
                return
            text = b''.join(_parts(chunks, _MAX_PAGE)).decode('utf-8', 'replace') if page else ''
            if answer.status_code >= 400:
                raise self._http_error(answer.status_code, text, here)
        form = _confirmation(text, here) if self.drive and not answered else None
        if form is None:
            raise _page_error(text, here, self.drive)
        self._receive(form, answered=True)

    def _http_error(self, code: int, page: str, url: str) -> Exception:
        words = f'{code} {http.client.responses.get(code, "")}'.strip()
        if code in (408, 425, 429, 500, 502, 503, 504):
            return _Retry(f'the host answers {words}')
        if code == 416:
            self.partial.unlink(missing_ok=True)
            return _Retry('the host has another file than before')
        if code in (404, 410):
            return FetchError(f'{_name(url)}: the file is not there any more ({words}).')
        if code in (401, 403):
            if self.drive and _is_quota(page):
                return _page_error(page, url, True)
            return FetchError(f'{_name(url)}: no permission to read the file ({words}).')
        return FetchError(f'{_name(url)}: the host answers {words}.')

    def _store(self, answer: Any, chunks: Iterator[bytes], url: str, have: int) -> None:
        """Append to what is there, or begin anew if the host does."""
        begin, total = 0, None
        length = answer.headers.get('Content-Length', '')
        if answer.status_code == 206:
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
            raise FetchError(f'{_name(url)}: a file of {wanted} was expected, got {total}.')
        received = begin
        self.bar.reset(total)
        self.bar.update(begin)
        try:
            with open(self.partial, 'ab' if begin else 'wb') as file:
                for chunk in _parts(chunks):
                    file.write(chunk)
                    received += len(chunk)
                    self.bar.update(len(chunk))
                    if received > MAX_SIZE:
                        raise FetchError(f'The host sends more than {MAX_SIZE} bytes.')
            if total is not None and received != total:
                raise _Retry('too few bytes')
        except _Retry as e:
            of = '' if total is None else f' of {total}'
            raise _Retry(f'the connection broke after {received} bytes{of}') from e


def _check(path: Path, size: Optional[int], sha256: Optional[str]) -> None:
    got = path.stat().st_size
    if got == 0 or (size is not None and got != size):
        raise FetchError(f'The file arrived damaged: it has {got} bytes, {"more" if size is None else size} expected.')
    with open(path, 'rb') as file:
        start = file.read(512).decode('utf-8', 'replace').lstrip()
    if start.lower().startswith(('<!doctype html', '<html')):
        raise FetchError(f'A page came instead of a file: {page_title(start)!r}.')
    digest = hash_file(path) if sha256 is not None else None
    if digest != sha256:
        raise FetchError(f'The file arrived damaged: its sha256 is {digest}, expected {sha256}. It was deleted.')


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
    here, there = urlsplit(url), urlsplit(urljoin(url, form.action))
    google = '.google.com'
    known = there.netloc == here.netloc or (
        there.scheme == 'https' and f'.{there.hostname}'.endswith(google) and f'.{here.hostname}'.endswith(google))
    base = there if known else here  # a mirror stands for the host its pages name
    return _with_query(urlunsplit((base.scheme, base.netloc, base.path, '', '')), form.inputs)


def page_title(page: str) -> str:
    """Return the title of a page of HTML."""
    found = re.search(r'<title[^>]*>([^<]{0,200})', page, re.IGNORECASE)
    return ' '.join(found[1].split()) if found else 'without a title'


def _is_quota(page: str) -> bool:
    return re.search(r'quota exceeded|too many users have (?:viewed or downloaded|recently)', page, re.I) is not None


def _page_error(page: str, url: str, drive: bool) -> FetchError:
    host, title = _name(url), page_title(page)
    if drive and _is_quota(page):
        return FetchError(
            f'{host}: the quota of this file is used up ({title!r}): too many users fetched it. '
            'Try again within 24 hours.')
    if drive and (re.search(r'access denied|you need access|need permission|sign in', title, re.I) or (
            'ServiceLogin' in urlsplit(url).path or host.startswith('accounts.'))):
        return FetchError(f'{host}: no permission to read the file ({title!r}).')
    return FetchError(f'{host}: a page came instead of a file: {title!r}.')
