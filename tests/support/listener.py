"""The host of a webhook, on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.serve_in_thread import serve_in_thread


class Listener(ThreadingHTTPServer):
    """Answers with `statuses` in turn, then 200; `heard` is every body, `posts` its headers too."""

    daemon_threads = True

    def __init__(self, *statuses: int) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.statuses = list(statuses)
        self.heard: list[dict[str, Any]] = []
        self.posts: list[tuple[dict[str, str], bytes]] = []  # headers and body
        self.retry_after: str | None = None
        self.hold = threading.Event()  # no answer is given until it is set
        self.hold.set()
        self.url = f"http://127.0.0.1:{self.server_port}/hook?token=1"


class Answering(BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self) -> None:
        assert self.path == "/hook?token=1"
        assert self.headers["Content-Type"] == "application/json"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.hold.wait(10)
        self.server.posts.append((dict(self.headers), body))
        self.server.heard.append(json.loads(body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        if self.server.retry_after is not None:
            self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def listening() -> Iterator[Listener]:
    with serve_in_thread(Listener()) as listener:
        yield listener
