"""Clients that are slow to send or to read, and hosts that are slow to answer."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

from sdbento.images import codec
from tests.soak.ground import Ground
from tests.soak.load import Oracle
from tests.support.images import gradient
from tests.support.serve_in_thread import serve_in_thread

Kind = Callable[[Ground, socket.socket, float], None]
CLIENTS = 24  # at once
MOST_SECONDS = 60.0  # that one of them keeps its connection
NOT_FETCHED = (422, 503, 504)  # what a request is answered whose image cannot be had


def slow_clients(ground: Ground, _oracle: Oracle, chance: Random) -> None:
    kinds: dict[str, Kind] = {
        "silent": _silent,
        "slow head": _slow_head,
        "slow body": _slow_body,
        "slow reader": _slow_reader,
    }
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in ground.pauses(chance, 0.5, 4.0):
            name = chance.choice([*kinds])
            pool.submit(_connect, ground, name, kinds[name], Random(chance.random()))


def _connect(ground: Ground, name: str, kind: Kind, chance: Random) -> None:
    until = time.monotonic() + chance.uniform(5.0, MOST_SECONDS)
    start, end = time.monotonic(), "left"
    try:
        with socket.create_connection(("127.0.0.1", ground.port), timeout=5) as connection:
            kind(ground, connection, until)
            connection.settimeout(0.2)
            with suppress(TimeoutError):
                end = "answered" if connection.recv(100) else "closed by the server"
    except OSError:
        end = "closed by the server"
    ground.record.answered("slow", f"{name}: {end}", time.monotonic() - start)


def _trickle(ground: Ground, connection: socket.socket, data: bytes, until: float) -> None:
    """A byte at a time, until the time is up or the server says something."""
    connection.settimeout(0.5)
    for byte in data:
        if time.monotonic() > until or ground.stop.is_set():
            return
        connection.sendall(bytes([byte]))
        with suppress(TimeoutError):
            if connection.recv(1, socket.MSG_PEEK) is not None:
                return


def _silent(ground: Ground, _connection: socket.socket, until: float) -> None:
    ground.stop.wait(until - time.monotonic())


def _slow_head(ground: Ground, connection: socket.socket, until: float) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\n" + b"X-Padding: x\r\n" * 100
    _trickle(ground, connection, head, until)


def _head(ground: Ground, path: str, length: int) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {ground.keys['slow']}",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    ]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def _slow_body(ground: Ground, connection: socket.socket, until: float) -> None:
    body = json.dumps({"prompt": "a slow circle" * 100}).encode()
    connection.sendall(_head(ground, "/generate", len(body)))
    _trickle(ground, connection, body, until)


def _slow_reader(ground: Ground, connection: socket.socket, until: float) -> None:
    """Asks for events with previews, and reads a few bytes a second of them."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    fields = {"prompt": "a circle", "num_inference_steps": 30, "preview_every": 1}
    body = json.dumps(fields | {"num_images": 2}).encode()
    connection.sendall(_head(ground, "/generate_stream", len(body)) + body)
    connection.settimeout(10)
    while time.monotonic() < until and not ground.stop.wait(0.5):
        with suppress(TimeoutError):
            if not connection.recv(64):
                return


class Stranger(ThreadingHTTPServer):
    """A host of images and webhooks that answers late, piecemeal, wrongly or never."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.image = codec.encode(gradient(96, 96), "png")

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up are what it is for."""


class Answering(BaseHTTPRequestHandler):
    server: Stranger

    def do_GET(self) -> None:
        late, ended = self.server.image, self.server.ended
        if self.path == "/never":
            ended.wait(30)
            return
        self.send_response(302 if self.path == "/elsewhere" else 200)
        if self.path == "/elsewhere":
            self.send_header("Location", f"{self.server.url}/elsewhere")
        self.send_header("Content-Length", str(len(late)))
        self.end_headers()
        if self.path == "/piecemeal":
            for byte in late:
                self.wfile.write(bytes([byte]))
                if ended.wait(0.2):
                    return
        elif self.path == "/cut":
            self.wfile.write(late[: len(late) // 2])
        else:
            ended.wait(1.0 if self.path == "/late" else 0)
            self.wfile.write(late)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.ended.wait(8)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def _stranger() -> Iterator[Stranger]:
    with serve_in_thread(Stranger()) as stranger:
        try:
            yield stranger
        finally:
            stranger.ended.set()


def strangers(ground: Ground, _oracle: Oracle, chance: Random) -> None:
    """Requests that name slow hosts, as image and as webhook."""
    with _stranger() as stranger, ThreadPoolExecutor(CLIENTS) as pool:

        def one(path: str) -> None:
            body = {"prompt": "x", "num_inference_steps": 2, "strength": 0.5}
            body |= {"image": f"{stranger.url}{path}"}
            expected = (200, 429) if path in ("/late", "/good") else (*NOT_FETCHED, 429)
            ground.ask("strangers", "POST", "/generate", expected, json=body)

        def webhook() -> None:
            body = {"input": {"prompt": "x", "num_inference_steps": 2}, "webhook": stranger.url}
            ground.ask("strangers", "POST", "/run", (200, 429), json=body)

        paths = ["/never", "/piecemeal", "/cut", "/elsewhere", "/late", "/good"]
        for _ in ground.pauses(chance, 1.0, 5.0):
            if chance.random() < 0.3:
                pool.submit(webhook)
            else:
                pool.submit(one, chance.choice(paths))
