"""Hosts on loopback with names of their own, in the event loop of a test; some of them are slow."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from sdbento.outbound import names


class Hosts:
    """Answers every request with `body`, those to names that begin with "slow" only when `answer`
    is set. `connected` counts the open requests by name."""

    def __init__(self, body: bytes, port: int = 0) -> None:
        self.body = body
        self.port = port
        self.answer = asyncio.Event()
        self.connected: Counter[str] = Counter()
        self.serving: set[asyncio.Task[None]] = set()
        self.received: dict[str, list[bytes]] = {}  # bodies, by name

    def url(self, name: str) -> str:
        return f"http://{name}:{self.port}/image.png"

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self.serving.add(task)
        task.add_done_callback(self.serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:-2])
            name = fields["host"].partition(":")[0]
            sent = await reader.readexactly(int(fields.get("content-length", 0)))
            self.connected[name] += 1
            try:
                if not name.startswith("slow") or await self._is_answered(reader):
                    self.received.setdefault(name, []).append(sent)
                    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(self.body)}\r\n\r\n"
                    writer.write(head.encode() + self.body)
                    await writer.drain()
            finally:
                self.connected[name] -= 1
        writer.close()

    async def _is_answered(self, reader: asyncio.StreamReader) -> bool:
        """False if the client went away before."""
        gone = asyncio.ensure_future(reader.read())
        answered = asyncio.ensure_future(self.answer.wait())
        await asyncio.wait([gone, answered], return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        answered.cancel()
        return self.answer.is_set()


@asynccontextmanager
async def hosting(
    monkeypatch: pytest.MonkeyPatch, body: bytes = b"picture", num_addresses: int = 1
) -> AsyncIterator[Hosts]:
    """Names like `slow-7.example` lead to 127.0.0.8, counted modulo `num_addresses`."""

    def look_up(name: str, port: int) -> list[str]:
        number = name.partition(".")[0].rpartition("-")[2]
        return [f"127.0.0.{1 + int(number) % num_addresses}"]

    monkeypatch.setattr(names, "look_up", look_up)
    hosts = Hosts(body)
    first = await asyncio.start_server(hosts.accept, "127.0.0.1", backlog=1000)
    hosts.port = first.sockets[0].getsockname()[1]
    others = [f"127.0.0.{1 + i}" for i in range(1, num_addresses)]
    more = await asyncio.start_server(hosts.accept, others, hosts.port) if others else first
    try:
        yield hosts
    finally:
        hosts.answer.set()
        await asyncio.gather(*hosts.serving)
        first.close()
        more.close()
