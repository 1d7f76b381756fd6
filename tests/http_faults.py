"""A proxy between a client and its HTTP server that does faults, as often as told, and lets the rest through."""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlparse

from local_server import local_server

CUT = "cut"
"""The connection is reset in the middle of the answer's body."""
CLOSE = "close"
"""The connection is closed before the request is read."""
BUSY = "busy"
"""503 SlowDown; the server never sees the request."""
LOST = "lost"
"""The server does what was asked, the client is told 500."""
TRICKLE = "trickle"
"""One byte of the answer's body every 50 ms."""
FLIP = "flip"
"""One bit of the answer's body is another, its length is right."""
RATE = "rate"
"""429 with Retry-After; the server never sees the request."""
HANG = "hang"
"""Nothing is answered for HANG_SECONDS, then the connection is closed; the server never sees the request."""
HANG_SECONDS = 8.0
DENY = "deny"
"""401, as for a wrong key."""
UNCONDITIONAL = "unconditional"
"""If-None-Match is dropped, as by a server that does not know it."""


@dataclass
class Faults:
    target: str
    kinds: tuple[str, ...] = ()
    times: float = 0
    share: float = 1
    method: str = ""
    """Only requests of this method; all where empty."""
    path: str = ""
    """Only requests whose path holds this."""
    url: str = ""
    delivered: list[bytes] = field(default_factory=list)
    """Bodies of the requests whose answers reached the client whole, with status 200."""
    requests: int = 0
    seen: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def plan(
        self, *kinds: str, times: float = float("inf"), method: str = "", path: str = "", share: float = 1
    ) -> None:
        """From now on this `share` of the requests has a fault, the kinds in turn, at most `times` in all."""
        self.kinds, self.times, self.method, self.path, self.share = kinds, times, method, path, share
        self.requests = self.seen = 0

    def take(self, method: str, path: str) -> str:
        with self.lock:
            if (
                not self.kinds
                or self.seen >= self.times
                or (self.method and method != self.method)
                or self.path not in path
            ):
                return ""
            self.requests += 1
            if int(self.requests * self.share) == int((self.requests - 1) * self.share):
                return ""
            self.seen += 1
            return self.kinds[self.seen % len(self.kinds)]


@contextmanager
def proxy(target: str) -> Iterator[Faults]:
    """Faults of the proxy at `.url` in front of the server `target` (http://host:port)."""
    faults = Faults(target)
    handler = type("Handler", (_Handler,), {"faults": faults})
    with local_server(handler) as faults.url:
        yield faults


@contextmanager
def dull_server(says: bytes = b"", then: bytes = b"") -> Iterator[str]:
    """A server that accepts, says `says`, and then repeats `then` every 0.2 s for ever. Gives its URL."""
    ended = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.sendall(says)
                while not ended.wait(0.2):
                    self.request.sendall(then)

    with local_server(Handler) as url:
        try:
            yield url
        finally:
            ended.set()


@contextmanager
def black_hole() -> Iterator[str]:
    """URL of a port where nobody takes a connection, as behind a firewall that drops packets: its queue is full."""
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults

    def do_GET(self) -> None:
        fault = self.faults.take(self.command, self.path)
        if fault == CLOSE:
            self._hang_up()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == BUSY:
            self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == RATE:
            self._answer(429, [("Retry-After", "1")], b'{"error": {"message": "slow down"}}')
            return
        if fault == DENY:
            self._answer(401, [], b'{"error": {"message": "Incorrect API key provided: sk-wr***"}}')
            return
        if fault == HANG:
            threading.Event().wait(HANG_SECONDS)
            self._hang_up()
            return
        status, headers, answer = self._forward(body, fault)
        if fault == LOST:
            self._answer(500, [], b"<Error><Code>InternalError</Code></Error>")
            return
        if fault == FLIP and answer:
            answer = answer[:-1] + bytes([answer[-1] ^ 1])
        self._answer(status, headers, answer, fault)
        if status == 200 and fault != CUT:
            self.faults.delivered.append(body)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _forward(self, body: bytes, fault: str) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        if fault == UNCONDITIONAL:
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        place = urlparse(self.faults.target)
        connection = HTTPConnection(str(place.hostname), place.port, timeout=30)
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: str = "") -> None:
        self.send_response_only(status)
        dropped = {"transfer-encoding", "connection"} | (set() if self.command == "HEAD" else {"content-length"})
        for name, value in headers:
            if name.lower() not in dropped:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == CUT:
            self.wfile.write(body[: len(body) // 2])
            self._hang_up()
        elif fault == TRICKLE:
            self._trickle(body)
        else:
            self.wfile.write(body)

    def _trickle(self, body: bytes) -> None:
        wait = threading.Event()
        try:
            for position in range(len(body)):
                self.wfile.write(body[position : position + 1])
                self.wfile.flush()
                wait.wait(0.05)
        except OSError:
            self.close_connection = True

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        # Closing with unread input or no linger sends a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        return
