"""Messages to and from another process of ours, over a private pair of sockets.

They are pickled, which must only be done between processes that trust each other: nobody else has
either end, and nothing listens. Both directions have a thread of their own, so that neither a large
image nor a process that does not read holds up whoever sends.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Generic, TypeVar

import numpy as np

from sdbento.backend.pool.pickling import Buffer, dumps, loads

log = logging.getLogger(__name__)

M = TypeVar("M")

FLUSH = 5.0  # seconds that `close` waits for what was sent before
COUNT, LENGTH = struct.Struct("<I"), struct.Struct("<Q")


class Channel(Generic[M]):
    """One end. `send` may be called from any thread, before `start` as well."""

    def __init__(self, end: socket.socket, name: str) -> None:
        self._socket = end
        self._outbox: SimpleQueue[M | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name=f"{name}-send", daemon=True)
        self._name = name

    def start(self, receive: Callable[[M], None], on_end: Callable[[], None]) -> None:
        """Call `receive` with each message, and `on_end` once when the other end is gone, both on a
        thread of this channel."""
        self._sender.start()
        self._receiver = threading.Thread(
            target=self._receive_all,
            args=(receive, on_end),
            name=f"{self._name}-receive",
            daemon=True,
        )
        self._receiver.start()

    def send(self, message: M) -> None:
        """Never blocks. What the other end does not read before it goes is lost."""
        self._outbox.put(message)

    def close(self) -> None:
        """Wait until all is sent, for a while, and hang up. From any thread but the channel's."""
        self._outbox.put(None)
        self._sender.join(FLUSH)
        with suppress(OSError):  # the other end is gone
            self._socket.shutdown(socket.SHUT_RDWR)  # which wakes the other threads
        self._receiver.join(FLUSH)
        self._socket.close()

    def _send_all(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._send(dumps(message))
            except OSError:
                return  # `on_end` tells
            except Exception:
                log.exception("a message could not be sent: %s", type(message).__name__)
            del message  # and its images, while this waits for the next

    def _send(self, parts: list[Buffer]) -> None:
        """How many parts there are, how long each is, and the parts."""
        lengths = [LENGTH.pack(memoryview(part).nbytes) for part in parts]
        self._socket.sendall(COUNT.pack(len(parts)) + b"".join(lengths))
        for part in parts:
            self._socket.sendall(part)

    def _receive_all(self, receive: Callable[[M], None], on_end: Callable[[], None]) -> None:
        try:
            while True:
                receive(loads(self._receive()))
        except (OSError, EOFError):
            pass
        except Exception:
            log.exception("a message could not be understood: the channel is given up")
        on_end()

    def _receive(self) -> list[Buffer]:
        (count,) = COUNT.unpack(self._read(COUNT.size))
        lengths = self._read(count * LENGTH.size)
        return [self._read(length) for (length,) in LENGTH.iter_unpack(lengths)]

    def _read(self, length: int) -> memoryview:
        """Memory that is not cleared first, which would hold the interpreter's lock."""
        memory = np.empty(length, np.uint8).data
        done = 0
        while done < length:
            count = self._socket.recv_into(memory[done:])
            if not count:
                raise EOFError
            done += count
        return memory
