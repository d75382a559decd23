"""uvicorn with our protocol around a small ASGI application, and sockets that misbehave."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import Receive, Scope, Send

from sdbento.doors.network.limits import Limits
from sdbento.doors.network.protocol import bounded

HANG = 30.0  # seconds in which anything happens, on the busiest machine

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
LARGE = 20_000_000  # bytes of an answer in one piece
GET_LARGE = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"
SLEEP = b"GET /sleep HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the number of bytes that it got: at once, or what `path` says."""
    size = 0
    if scope["path"] != "/early":
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            if not message["more_body"]:
                break
    if scope["path"] == "/sleep":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    num = 200 if scope["path"] == "/endless" else 1
    await send({"type": "http.response.start", "status": 200, "headers": []})
    bodies = {"/endless": b"x" * 1_000_000, "/large": b"x" * LARGE}
    for _ in range(num):
        body = bodies.get(scope["path"], b"%d" % size)
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


class Door:
    """A port with `limits`."""

    def __init__(self, port: int, server: uvicorn.Server) -> None:
        self.port = port
        self._server = server

    @property
    def num_connections(self) -> int:
        return len(self._server.server_state.connections)

    def connect(self, *sent: bytes, source: str = "127.0.0.1") -> socket.socket:
        """A connection from `source`, over which this has been sent."""
        client = socket.create_connection(("127.0.0.1", self.port), HANG, (source, 0))
        for data in sent:
            client.sendall(data)
        return client

    def ask(self, *sent: bytes) -> bytes:
        """All that is answered until the server closes the connection, or has answered once."""
        with self.connect(*sent) as client:
            return answer(client)


def answer(client: socket.socket) -> bytes:
    """One answer as it came: its head, and its body if it has a length."""
    data = b""
    with suppress(ConnectionError):
        while b"\r\n\r\n" not in data or not _is_whole(data):
            if not (more := client.recv(65536)):
                break
            data += more
    return data


def _is_whole(data: bytes) -> bool:
    head, _, body = data.partition(b"\r\n\r\n")
    if b"chunked" in head:
        return body.endswith(b"0\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return len(body) >= int(length or b"0")


def is_closed(client: socket.socket) -> bool:
    """Whether the server closes the connection before long."""
    give_up = time.monotonic() + HANG
    with suppress(ConnectionError):
        while time.monotonic() < give_up:
            if not client.recv(65536):
                return True
        return False
    return True


@contextmanager
def listening(limits: Limits) -> Iterator[Door]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=bounded(limits), log_config=None, lifespan="off", timeout_keep_alive=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Door(listener.getsockname()[1], server)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(HANG)
