"""An HTTP server of a folder, or in front of another server, that fails as servers do: slowly, with 503, with a
connection that is cut, with a body that is too short. It notes every request."""

import http.client, random, threading, time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

FAULTS = ('slow', '503', 'cut', 'short')


class Request(NamedTuple):
    "One request, and what became of it"

    method: str
    path: str  # without the query
    query: str
    range: str  # of bytes; empty for a whole file
    fault: str  # one of `FAULTS`; empty for none
    probe: bool  # a GET for size and version alone, whose body is not read


class FaultServer(ThreadingHTTPServer):
    "A server on a free port of this machine"

    daemon_threads = True

    def __init__(self, folder=None, upstream='', share=0.0, seed=0, kinds=FAULTS, delay=0.05):
        super().__init__(('127.0.0.1', 0), Handler)
        self.folder, self.upstream, self.share, self.kinds = folder, upstream, share, kinds
        self.delay, self.random, self.lock = delay, random.Random(seed), threading.Lock()
        self.requests: list[Request] = []
        self.url = f'http://127.0.0.1:{self.server_port}'

    def draw(self, method, path, probe):
        "The fault of a request; a short body is given to shards only, whose size readers know"
        with self.lock:
            fault = self.random.choice(self.kinds) if self.random.random() < self.share else ''
        if fault == 'short' and (probe or not path.endswith('.tar')):
            return '503'
        return '503' if fault in ('cut', 'short') and method != 'GET' else fault

    def fetched(self, ending='.tar'):
        "How often each piece of a file came whole: (path, range) to a number"
        got = [r for r in self.requests if r.method == 'GET' and not r.probe]
        whole = [r for r in got if r.fault in ('', 'slow')]
        return Counter((r.path, r.range) for r in whole if r.path.endswith(ending))

    def handle_error(self, request, client_address):
        "A client that was killed is no error"


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *arguments):
        "Nothing is printed"

    def answer(self):
        server, parts = self.server, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        asked = self.headers.get('Range', '')
        plain = self.headers.get('Accept-Encoding') == 'identity'
        probe = plain and not asked and not server.upstream  # of fsspec
        fault = server.draw(self.command, parts.path, probe)
        note = Request(self.command, parts.path, parts.query, asked, fault, probe)
        server.requests.append(note)
        if fault == 'slow':
            time.sleep(server.delay)
        if fault == '503':
            return self.send(503, {}, b'busy')
        if server.upstream:
            status, headers, data = self.forward(body)
        else:
            status, headers, data = self.read(unquote(parts.path), asked)
        self.send(status, headers, data, fault if status < 300 else '')

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def forward(self, body):
        "The answer of the server behind this one"
        there = http.client.HTTPConnection(urlsplit(self.server.upstream).netloc, timeout=30)
        there.request(self.command, self.path, body, dict(self.headers))
        answer = there.getresponse()
        drop = ('transfer-encoding', 'connection', 'date', 'server')
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in drop}
        return answer.status, headers, answer.read()

    def read(self, path, asked):
        "A file of the folder, a part of it, or a page that lists a folder"
        file = Path(self.server.folder, path.lstrip('/'))
        if file.is_dir():
            names = [f'{p.name}/' if p.is_dir() else p.name for p in sorted(file.iterdir())]
            page = ''.join(f'<a href="{path.rstrip("/")}/{name}">{name}</a>\n' for name in names)
            return 200, {'Content-Type': 'text/html'}, page.encode()
        if not file.is_file():
            return 404, {}, b'not here'
        data, stat = file.read_bytes(), file.stat()
        headers = {'ETag': f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"', 'Accept-Ranges': 'bytes'}
        if not asked:
            return 200, headers, data
        first, _, last = asked.removeprefix('bytes=').partition('-')
        first, last = int(first), min(int(last or len(data) - 1), len(data) - 1)
        headers['Content-Range'] = f'bytes {first}-{last}/{len(data)}'
        return 206, headers, data[first : last + 1]

    def send(self, status, headers, data, fault=''):
        "An answer, whole or not"
        if fault == 'short':
            data = data[: len(data) // 2]
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != 'content-length':
                self.send_header(name, value)
        length = headers.get('Content-Length', len(data)) if self.command == 'HEAD' else len(data)
        self.send_header('Content-Length', str(length))
        self.end_headers()
        if self.command == 'HEAD':
            return
        if fault == 'cut':
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(data)


@contextmanager
def serve(**options):
    "A fault server for the time of a block"
    server = FaultServer(**options)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
