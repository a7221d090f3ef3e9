"""Google Drive and a bucket on the loopback address, with the pages and faults that they have."""
import base64
import html
import re
import threading
import urllib.parse
from typing import Dict, List

from local_server import LocalServer, QuietHandler

WARNING = """<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<p class="uc-warning-caption">Google Drive can't scan this file for viruses.</p>
<form id="download-form" action="{action}" method="get">
<input type="submit" id="uc-download-link" value="Download anyway"/>
<input type="hidden" name="id" value="{id}"><input type="hidden" name="export" value="download">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="0f-1e&amp;2d">
</form></body></html>"""
QUOTA = """<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>
<p class="uc-error-caption">Sorry, you can't view or download this file at this time.</p>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p></body></html>"""
DENIED = '<!DOCTYPE html><html><head><title>Google Drive - Access Denied</title></head><body>No access</body></html>'
UNKNOWN = '<html><head><title>Something new</title></head><body>Hello</body></html>'
PAGES = {'quota': QUOTA, 'denied': DENIED, 'unknown': UNKNOWN}


class HostServer(LocalServer):
    """Files by id or name. `faults` makes the next answers for one wrong; `requests` records what was asked."""

    def __init__(self):
        super().__init__(_Handler)
        self.files: Dict[str, bytes] = {}
        self.warned: set = set()  # files that are too large to scan
        self.action = ''  # where the warning page's form leads; '' is this server
        self.faults: Dict[str, List[str]] = {}  # 'cut', a page of PAGES, an HTTP status, and others, see below
        self.requests: List[str] = []
        self.login = ''  # name:password that is wanted
        self.gate = threading.Event()  # files wait for it
        self.gate.set()
        self.drive, self.flowvision = f'{self.address}/drive', f'{self.address}/flowvision'

    def environment(self, store):
        return {'TIMM_CROSSFORMER_DRIVE_URL': self.drive, 'TIMM_CROSSFORMER_FLOWVISION_URL': f'{self.flowvision}/',
                'TIMM_CROSSFORMER_CACHE': str(store)}

    def __exit__(self, *exc):
        self.gate.set()
        super().__exit__(*exc)


class _Handler(QuietHandler):
    owner: HostServer

    def _answer(self, status, body, kind='application/octet-stream', **headers):
        self.send_response(status)
        self.send_header('Content-Type', kind)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), str(value))
        if 'Content_Length' not in headers:
            self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        host = self.owner
        host.requests.append(self.path + (f' {self.headers["Range"]}' if 'Range' in self.headers else ''))
        wanted = base64.b64encode(host.login.encode()).decode()
        if host.login and self.headers.get('Authorization') != f'Basic {wanted}':
            return self._answer(401, b'<html><title>Log in</title></html>', 'text/html')
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        drive = address.path == '/drive'
        name = query.get('id', '') if drive else address.path.rpartition('/')[2]
        if drive and (query.get('export'), query.get('confirm')) != ('download', 't'):
            return self._answer(400, b'')
        faults = host.faults.get(name, [])
        fault = faults.pop(0) if faults else ''
        if fault in PAGES:
            return self._answer(200, PAGES[fault].encode(), 'text/html; charset=utf-8')
        if fault.isdigit():
            return self._answer(int(fault), b'<html><title>Error</title></html>', 'text/html')
        if name not in host.files:
            return self._answer(404, b'<html><title>Not found</title></html>', 'text/html')
        if drive and name in host.warned and (query.get('uuid') != '0f-1e&2d' or fault == 'loop'):
            page = WARNING.format(id=html.escape(name), action=host.action or '/drive')
            return self._answer(200, page.encode(), 'text/html; charset=utf-8')
        host.gate.wait(30)
        self._file(host.files[name], fault, {'Content_Disposition': 'attachment; filename="x.pth"'} if drive else {})

    def _file(self, body, fault, headers):
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        status, start = 200, 0
        if asked and fault != 'no-range':
            status, start = 206, int(asked[1])
            headers['Content_Range'] = f'bytes {start}-{len(body) - 1}/{len(body)}'
        if fault == 'html-file':
            body = UNKNOWN.encode()
        if fault == 'flip':
            body = body[:-1] + bytes([body[-1] ^ 1])
        headers['ETag'] = f'"{len(body)}"'
        if fault == 'cut':
            part = body[start:start + max((len(body) - start) // 2, 1)]
            self._answer(status, part, Content_Length=len(body) - start, **headers)
            self.wfile.flush()
            self.close_connection = True
            return
        self._answer(status, body[start:], **headers)
