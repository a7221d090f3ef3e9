"""Files from hosts that behave as Google Drive and a bucket do."""
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
PART = len(DATA) // 16
READ = http.client.HTTPResponse.read


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
        assert f' bytes={len(DATA) // 2}-' in host.requests[1]


@KINDS
@pytest.mark.parametrize('faults, message', [
    (['404'], r'not there any more \(404'), (['403'], 'no permission'), (['401'], 'no permission'),
    (['418'], 'the host answers 418'), (['unknown'], "a page came instead of a file: 'Something new'"),
    (['html-file'], "page came instead of a file: 'something new'"),
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


def test_gdown_is_the_second_try(host, tmp_path, monkeypatch):
    asked = []

    def fetch(id, output, **kwargs):
        asked.append(id)
        with open(output, 'wb') as file:
            file.write(content)
        return output

    gdown = types.ModuleType('gdown')
    gdown.__spec__ = types.SimpleNamespace(name='gdown')
    gdown.download = fetch
    monkeypatch.setitem(sys.modules, 'gdown', gdown)
    content = DATA
    faulty(host, 'unknown')
    assert download_drive('ID', tmp_path / 'x').read_bytes() == DATA and asked == ['ID']
    content = b'<!DOCTYPE html><html><title>No</title>'
    faulty(host, 'unknown')
    with pytest.raises(FetchError, match=r"'Something new'.*gdown: A page came"):
        download_drive('ID', tmp_path / 'y')
    assert not (tmp_path / 'y').exists()
    assert download_drive('ID', tmp_path / 'y').read_bytes() == DATA and len(asked) == 2


def failing_reads(monkeypatch, *errors):
    """Have the answers of hosts fail, one after the other, once a part of the file is here."""
    errors = list(errors)
    begun = []

    def partly(self, amount=None):
        if errors and self in begun:
            raise errors.pop(0)
        begun.append(self)
        return READ(self, PART if errors else amount)

    monkeypatch.setattr(http.client.HTTPResponse, 'read', partly)


@pytest.mark.parametrize('error', [
    ssl.SSLError('bad record'), OSError(errno.EHOSTUNREACH, 'no route'), ConnectionResetError(), TimeoutError(),
    http.client.IncompleteRead(b''),
], ids=lambda error: type(error).__name__)
def test_a_connection_that_fails_in_any_way_is_taken_up_again(host, tmp_path, monkeypatch, error):
    failing_reads(monkeypatch, error)
    assert get(host, tmp_path / 'x', 'plain').read_bytes() == DATA
    assert len(host.requests) == 2 and f' bytes={PART}-' in host.requests[1]
    failing_reads(monkeypatch, *[error] * downloads.TRIES)
    with pytest.raises(FetchError, match=rf'the connection broke after \d+ bytes of {len(DATA)}, 5 times'):
        get(host, tmp_path / 'y', 'plain')
    assert [path.name for path in tmp_path.iterdir()] == ['x']


def test_an_interrupted_download_leaves_nothing(host, tmp_path, monkeypatch):
    failing_reads(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        get(host, tmp_path / 'x', 'plain')
    assert not list(tmp_path.iterdir())


def test_a_redirection_from_https_to_http_is_refused():
    import urllib.request

    handler = downloads._StaySafe()
    request = urllib.request.Request('https://a.example/x')
    with pytest.raises(FetchError, match='away from https, to http://b'):
        handler.redirect_request(request, None, 302, 'Found', {}, 'http://b.example/x')
    assert handler.redirect_request(request, None, 302, 'Found', {}, 'https://b.example/x').host == 'b.example'


def test_a_terminal_shows_progress_and_nothing_else_does(host, tmp_path, monkeypatch, capsys):
    get(host, tmp_path / 'x', 'plain')
    assert capsys.readouterr() == ('', '')
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    get(host, tmp_path / 'x', 'plain')
    out, err = capsys.readouterr()
    assert not out and 'x: 1 of 1 MB' in err
