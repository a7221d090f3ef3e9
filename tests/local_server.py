"""A server on this machine, for tests of what goes over the network."""
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalServer:
    """Serves on 127.0.0.1 inside a `with`; requests are handled by a subclass of `QuietHandler`."""

    def __init__(self, handler):
        self._http = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (handler,), {'owner': self}))
        self._http.daemon_threads = True
        self.address = f'http://127.0.0.1:{self._http.server_port}'
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class QuietHandler(BaseHTTPRequestHandler):
    """Says nothing, and lets clients leave; `owner` is the server it answers for."""

    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # the client may leave, or we cut it off
            self.close_connection = True
