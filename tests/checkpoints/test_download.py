"""Files from hosts that behave as Google Drive and a bucket do."""
import contextlib
import errno
import http.client
import ssl
import sys
import types

import pytest
from host_server import HostServer

from timm_crossformer.checkpoints import transfer as downloads
from timm_crossformer.checkpoints.transfer import FetchError, download, download_drive

DATA = bytes(range(256)) * 5000


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, 'WAIT', 0.001)
    with HostServer() as server:
        for name, value in server.environment(tmp_path / 'store').items():
            monkeypatch.setenv(name, value)
        server.files['ID'] = server.files['x.zip'] = DATA
        yield server


def get(host, path, kind, **kwargs):
    if kind == 'drive':
        return download_drive('ID', path, **kwargs)
    return download(f'{host.flowvision}/x.zip', path, **kwargs)


def faulty(host, *faults):
    host.faults['ID'] = host.faults['x.zip'] = list(faults)


KINDS = pytest.mark.parametrize('kind', ['drive', 'plain'])


@KINDS
def test_a_file_arrives_whole(host, tmp_path, kind):
    path = get(host, tmp_path / 'x', kind, size=len(DATA))
    assert path.read_bytes() == DATA
    assert [p.name for p in tmp_path.iterdir()] == ['x'] and len(host.requests) == 1


@pytest.mark.parametrize('action', ['', '/drive', 'https://drive.usercontent.google.com/download'])
def test_the_warning_page_is_answered_once(host, tmp_path, action):
    host.warned.add('ID')
    host.action = action
    assert download_drive('ID', tmp_path / 'x').read_bytes() == DATA
    assert len(host.requests) == 2 and 'uuid=0f-1e%262d' in host.requests[1]
    host.requests.clear()
    faulty(host, '', 'loop')
    with pytest.raises(FetchError, match=r'a page came instead of a file: .Google Drive - Virus scan warning'):
        download_drive('ID', tmp_path / 'y')
    assert len(host.requests) == 2 and not (tmp_path / 'y').exists()


@KINDS
@pytest.mark.parametrize('faults, requests', [
    (['cut'], 2), (['cut', 'cut', 'cut', 'cut'], 5), (['503', 'cut', '502'], 4), (['cut', 'no-range'], 2),
    (['429'], 2),
], ids=str)
def test_what_broke_off_is_taken_up_again(host, tmp_path, kind, faults, requests):
    faulty(host, *faults)
    assert get(host, tmp_path / 'x', kind).read_bytes() == DATA
    assert len(host.requests) == requests
    if faults[0] == 'cut':
        begun = int(host.requests[1].partition(' bytes=')[2].rstrip('-'))  # after the last whole chunk
        assert 0 <= len(DATA) // 2 - begun <= downloads._CHUNK


@KINDS
@pytest.mark.parametrize('faults, message', [
    (['404'], r'not there any more \(404'), (['403'], 'no permission'), (['401'], 'no permission'),
    (['418'], 'the host answers 418'), (['unknown'], "a page came instead of a file: 'Something new'"),
    (['html-file'], "page came instead of a file: 'Something new'"),
    (['cut'] * 9, r'the connection broke after \d+ bytes of 1280000, 5 times'),
    (['503'] * 9, 'answers 503 Service Unavailable, 5 times'),
], ids=str)
def test_failures_are_told_apart_and_leave_nothing(host, tmp_path, kind, faults, message):
    faulty(host, *faults)
    with pytest.raises(FetchError, match=message):
        get(host, tmp_path / 'x', kind)
    assert not list(tmp_path.iterdir())
    assert len(host.requests) == (5 if faults[1:] else 1)


@pytest.mark.parametrize('fault, message', [
    ('quota', "the quota of this file is used up.*'Google Drive - Quota exceeded'.*24 hours"),
    ('denied', "no permission to read the file .'Google Drive - Access Denied'"),
])
def test_pages_of_drive_are_understood(host, tmp_path, fault, message):
    for faults in ([fault], ['', fault]):
        host.warned.add('ID')
        faulty(host, *faults)
        with pytest.raises(FetchError, match=message):
            download_drive('ID', tmp_path / 'x')
    assert not list(tmp_path.iterdir())


def test_no_network_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, 'WAIT', 0.001)
    with pytest.raises(FetchError, match=r'127\.0\.0\.1:9: no network connection \(.*refused.*\), 5 times'):
        download('http://127.0.0.1:9/x', tmp_path / 'x')
    with pytest.raises(FetchError, match=r'no network connection'):
        download('http://nowhere.invalid/x', tmp_path / 'x')
    with pytest.raises(FetchError, match='http:// or https://'):
        download('file:///etc/hostname', tmp_path / 'x')
    assert not list(tmp_path.iterdir())


@KINDS
def test_known_size_and_hash_are_checked(host, tmp_path, kind):
    with pytest.raises(FetchError, match='a file of 7 bytes was expected, got 1280000'):
        get(host, tmp_path / 'x', kind, size=7)
    with pytest.raises(FetchError, match=r'arrived damaged: its sha256 is \w{64}, expected 00'):
        get(host, tmp_path / 'x', kind, sha256='00')
    host.files['ID'] = host.files['x.zip'] = b''
    with pytest.raises(FetchError, match='arrived damaged'):
        get(host, tmp_path / 'x', kind)
    assert not list(tmp_path.iterdir())


def test_no_more_is_taken_than_a_checkpoint_can_have(host, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, 'MAX_SIZE', 1000)
    with pytest.raises(FetchError, match='at most 1000 bytes was expected'):
        get(host, tmp_path / 'x', 'plain')
    assert not list(tmp_path.iterdir())


def failing_reads(monkeypatch, *errors):
    """Have the answers of hosts fail, one after the other, once a part of the file is here."""
    errors = list(errors)
    ask = downloads._ask

    def broken(chunks, error):
        yield next(chunks)
        raise error

    @contextlib.contextmanager
    def asking(url, headers):
        with ask(url, headers) as (answer, chunks):
            yield answer, broken(chunks, errors.pop(0)) if errors else chunks

    monkeypatch.setattr(downloads, '_ask', asking)


@pytest.mark.parametrize('error', [
    ssl.SSLError('bad record'), OSError(errno.EHOSTUNREACH, 'no route'), ConnectionResetError(), TimeoutError(),
    http.client.IncompleteRead(b''), EOFError(),
], ids=lambda error: type(error).__name__)
def test_a_connection_that_fails_in_any_way_is_taken_up_again(host, tmp_path, monkeypatch, error):
    failing_reads(monkeypatch, error)
    assert get(host, tmp_path / 'x', 'plain').read_bytes() == DATA
    assert len(host.requests) == 2 and f' bytes={downloads._CHUNK}-' in host.requests[1]
    failing_reads(monkeypatch, *[error] * downloads.TRIES)
    with pytest.raises(FetchError, match=rf'the connection broke after \d+ bytes of {len(DATA)}, 5 times'):
        get(host, tmp_path / 'y', 'plain')
    assert [path.name for path in tmp_path.iterdir()] == ['x']


def test_an_interrupted_download_leaves_nothing(host, tmp_path, monkeypatch):
    failing_reads(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        get(host, tmp_path / 'x', 'plain')
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def _redirecting(url, headers):
    """Lead https://a.example to what its path says, and have a file everywhere else."""
    to = url.removeprefix('https://a.example/')
    redirected = to != url
    answer = types.SimpleNamespace(
        status_code=302 if redirected else 200, headers={'Location': to} if redirected else {}, url=url)
    yield answer, iter([b'data'])


@pytest.mark.parametrize('target, ends', [
    ('https://b.example/x', True), ('http://b.example/token/x', False), ('ftp://b.example/x', False),
    ('https://a.example/https://a.example/http://b.example/x', False),
])
def test_no_redirection_leads_away_from_https(target, ends, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, '_ask', _redirecting)
    if ends:
        assert download(f'https://a.example/{target}', tmp_path / 'x').read_bytes() == b'data'
        return
    with pytest.raises(FetchError, match=r'away from https, to (http|ftp)://b\.example\.$'):
        download(f'https://a.example/{target}', tmp_path / 'x')
    assert not list(tmp_path.iterdir())


def test_redirections_end(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, 'urljoin', lambda base, url: base)
    monkeypatch.setattr(downloads, '_ask', _redirecting)
    with pytest.raises(FetchError, match='10 times'):
        download('https://a.example/https://b.example', tmp_path / 'x')


def test_a_terminal_shows_progress_and_nothing_else_does(host, tmp_path, monkeypatch, capsys):
    get(host, tmp_path / 'x', 'plain')
    assert capsys.readouterr() == ('', '')
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    get(host, tmp_path / 'x', 'plain')
    out, err = capsys.readouterr()
    assert not out and 'x:' in err and '1.28M' in err
