"""A small HTTP proxy in front of a real server, which can be told to fail as networks and servers do."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Literal
from urllib.parse import urlsplit

Mode = Literal["pass", "500", "401", "delay", "lose", "refuse"]
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}
CHANGING = re.compile(r"(POST|PUT|PATCH|DELETE) (?!.*search$)")


class FaultyProxy:
    """Forward to ``upstream``, as `mode` says.

    ``pass``: as is. ``500``, ``401``: that status, nothing is forwarded. ``delay``: forwarded after `seconds`. ``refuse``:
    the connection is reset, nothing is forwarded. ``lose``: forwarded, and when the server has answered, and so has
    committed, the connection is closed without the answer; that happens to the first `times` requests of each kind
    (method and path without ids) that change something and match `only`.

    `faults` counts the requests of each kind that did not pass, since the mode was set.
    """

    def __init__(self, upstream: str, port: int = 0) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.mode: Mode = "pass"
        self.seconds = 0.0
        self.times, self.only = 1, ""
        self.faults: Counter[str] = Counter()
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.uri = f"http://127.0.0.1:{self.server.server_port}"

    def set(self, mode: Mode, *, seconds: float = 0.0, times: int = 1, only: str = "") -> None:
        """Fail in another way from the next request on."""
        with self.lock:
            self.mode, self.seconds, self.times, self.only = mode, seconds, times, only
            self.faults.clear()

    def fault(self, kind: str) -> Mode:
        """Say what happens to a request of this kind, and count it."""
        with self.lock:
            passes = not (CHANGING.match(kind) and re.search(self.only, kind)) or self.faults[kind] >= self.times
            if self.mode == "pass" or (self.mode == "lose" and passes):
                return "pass"
            self.faults[kind] += 1
            return self.mode


@contextmanager
def faulty_proxy(upstream: str, port: int = 0) -> Iterator[FaultyProxy]:
    """Run a proxy in threads of this process; on ``port``, any free one where it is 0."""
    proxy = FaultyProxy(upstream, port)
    thread = threading.Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.set("refuse")  # connections that are still open
        proxy.server.shutdown()
        proxy.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: ClassVar[FaultyProxy]
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet: in two, each waits for an acknowledgement
    disable_nagle_algorithm = True

    def forward(self) -> None:
        body = self.body()
        path = re.sub(r"/artifacts/.*|[0-9a-f]{32}|\?.*", "", self.path)
        mode = self.proxy.fault(f"{self.command} {path}")
        if mode == "refuse":
            linger = struct.pack("ii", 1, 0)  # closing resets
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return
        if mode in ("500", "401"):
            self.answer(int(mode), {"Content-Type": "text/plain"}, f"the proxy says {mode}".encode())
            return
        if mode == "delay":
            time.sleep(self.proxy.seconds)
        headers = {key: value for key, value in self.headers.items() if key.lower() not in HOP}
        connection = HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
        except OSError as error:
            self.answer(502, {"Content-Type": "text/plain"}, str(error).encode())
            return
        finally:
            connection.close()
        if mode == "lose":
            self.close_connection = True
            return
        self.answer(
            response.status,
            {key: value for key, value in response.getheaders() if key.lower() not in HOP},
            content,
        )

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = forward

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
