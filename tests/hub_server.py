"""A Hub on the loopback address: as much of its HTTP interface as the real client uses to fetch and push a model."""
import base64
import hashlib
import json
import re
from typing import Dict, List, Optional

import huggingface_hub
import huggingface_hub.file_download
from local_server import LocalServer, QuietHandler

COMMIT = '0123456789abcdef0123456789abcdef01234567'


class HubServer(LocalServer):
    """Repositories in memory. `faults` makes the next answers for a file wrong; `requests` records what was asked."""

    def __init__(self):
        super().__init__(_Handler)
        self.repos: Dict[str, Dict[str, bytes]] = {}
        self.private: Dict[str, bool] = {}
        self.token: Optional[str] = None  # needed by every request if set
        self.faults: Dict[str, List[str]] = {}  # file name -> 'cut', 'flip' or an HTTP status, one per GET
        self.requests: List[str] = []
        self.uploads: Dict[str, bytes] = {}
        self.endpoint = self.address


def ask_here(monkeypatch, endpoint):
    """Have the client ask another address; before version 1, a module has the address of files by itself."""
    _forget_sessions()
    template = endpoint + '/{repo_id}/resolve/{revision}/{filename}'
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', endpoint)
    monkeypatch.setattr(huggingface_hub.constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(huggingface_hub.file_download, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)


def go_offline(monkeypatch):
    """Have the client ask nobody, as HF_HUB_OFFLINE=1 does at its import."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    _forget_sessions()


def _forget_sessions():
    """Before version 1, a session stays offline, or not, as it began."""
    getattr(huggingface_hub.utils, 'reset_sessions', lambda: None)()


class _Handler(QuietHandler):
    owner: HubServer

    def _answer(self, status, body=b'', **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), str(value))
        if 'Content_Length' not in headers:
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def _refused(self):
        if self.owner.token and self.headers.get('Authorization') != f'Bearer {self.owner.token}':
            self._answer(401, {'error': 'Invalid credentials'}, X_Error_Message='Invalid credentials')
            return True
        return False

    def _file(self):
        self.owner.requests.append(f'{self.command} {self.path}')
        match = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', self.path)
        if self._refused():
            return
        about = re.fullmatch(r'/api/models/([^/]+/[^/]+)/revision/main(\?expand=xetEnabled)?', self.path)
        if about and about[1] in self.owner.repos:  # asked before version 1, ahead of a commit
            return self._answer(200, {'id': about[1], 'sha': COMMIT, 'xetEnabled': False})
        if not match or match[1] not in self.owner.repos:
            return self._answer(404, {'error': 'Repository not found'}, X_Error_Code='RepoNotFound')
        body = self.owner.repos[match[1]].get(match[3])
        if body is None:
            return self._answer(404, b'', X_Error_Code='EntryNotFound', X_Repo_Commit=COMMIT)
        etag = hashlib.sha256(body).hexdigest() if match[3].endswith(('.safetensors', '.pt', '.bin')) else (
            hashlib.sha1(body).hexdigest())
        headers = {'X_Repo_Commit': COMMIT, 'X_Linked_Etag': f'"{etag}"', 'X_Linked_Size': len(body)}
        if self.command == 'HEAD':
            return self._answer(200, b'', Content_Length=len(body), **headers)
        faults = self.owner.faults.get(match[3], [])
        fault = faults.pop(0) if faults else ''
        if fault.isdigit():
            return self._answer(int(fault), {'error': 'made to fail'})
        if fault == 'flip':
            body = body[:-1] + bytes([body[-1] ^ 1])
        status, start = 200, 0
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if asked:
            status, start = 206, int(asked[1])
            headers['Content_Range'] = f'bytes {start}-{len(body) - 1}/{len(body)}'
        if fault == 'cut':
            half = body[start:start + (len(body) - start) // 2]
            self._answer(status, half, Content_Length=len(body) - start, **headers)
            self.wfile.flush()
            self.close_connection = True
            return
        self._answer(status, body[start:], **headers)

    do_GET = do_HEAD = _file

    def _body(self):
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers['Content-Length']))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_PUT(self):
        body = self._body()
        oid = self.path.rsplit('/', 1)[1]
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {'error': 'hash differs'})
        self.owner.uploads[oid] = body
        self._answer(200)

    def do_POST(self):
        self.owner.requests.append(f'POST {self.path}')
        body = self._body()
        if self._refused():
            return
        if self.path == '/api/validate-yaml':
            return self._answer(200, {'errors': [], 'warnings': []})
        if self.path == '/api/repos/create':
            asked = json.loads(body)
            repo = f'{asked["organization"]}/{asked["name"]}'
            if repo in self.owner.repos:
                return self._answer(409, {'error': 'exists', 'url': f'{self.owner.endpoint}/{repo}'})
            self.owner.repos[repo] = {}
            self.owner.private[repo] = asked.get('visibility') == 'private' or asked.get('private', False)
            return self._answer(200, {'url': f'{self.owner.endpoint}/{repo}', 'name': repo, 'id': repo})
        match = re.fullmatch(r'/api/models/([^/]+/[^/]+)/(preupload|commit)/main', self.path)
        if match and match[2] == 'preupload':
            return self._answer(200, {'files': [
                {'path': f['path'], 'uploadMode': 'lfs' if f['path'].endswith('.safetensors') else 'regular',
                 'shouldIgnore': False, 'oid': None} for f in json.loads(body)['files']]})
        if match:
            for line in map(json.loads, body.splitlines()):
                value = line['value']
                if line['key'] == 'file':
                    self.owner.repos[match[1]][value['path']] = base64.b64decode(value['content'])
                elif line['key'] == 'lfsFile':
                    self.owner.repos[match[1]][value['path']] = self.owner.uploads[value['oid']]
            return self._answer(200, {
                'success': True, 'commitOid': COMMIT, 'commitUrl': f'{self.owner.endpoint}/{match[1]}/commit/{COMMIT}'})
        if self.path.endswith('.git/info/lfs/objects/batch'):
            return self._answer(200, {'transfer': 'basic', 'objects': [
                {**o, 'actions': {'upload': {'href': f'{self.owner.endpoint}/lfs/{o["oid"]}'}}}
                for o in json.loads(body)['objects']]})
        self._answer(404, {'error': f'no such route {self.path}'})
