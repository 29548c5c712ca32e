"""A chat endpoint on 127.0.0.1 that answers as a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server says: the text of a completion, or a raw body; after a pause."""

    text: str | None = None
    status: int = 200
    body: bytes | None = None
    pause: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    trickle: float = 0.0  # seconds between bytes

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": self.text}}]}).encode()


@dataclass
class Server:
    """Its address and what it saw."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    most: int = 0
    running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def question(self, number: int = -1) -> str:
        return self.requests[number]["messages"][-1]["content"]


@contextmanager
def serve(answer: Callable[[dict[str, Any], int], Reply]) -> Iterator[Server]:
    """Run a server; `answer` gets the request and its number, from 0."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.requests)
                state.requests.append(request)
                state.headers.append(dict(self.headers))
                state.paths.append(self.path)
                state.running += 1
                state.most = max(state.most, state.running)
            try:
                reply = answer(request, number)
                time.sleep(reply.pause)
            finally:
                with state.lock:
                    state.running -= 1
            content = reply.content()
            try:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if reply.trickle:
                    for byte in content:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(reply.trickle)
                else:
                    self.wfile.write(content)
            except OSError:  # the client has given up, which is what some tests are about
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    class Busy(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Busy(("127.0.0.1", 0), Handler)
    state = Server(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
