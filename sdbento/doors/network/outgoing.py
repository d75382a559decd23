"""What is on its way to one client: how much it has not taken yet, and whether it is too slow.

uvicorn writes an answer as fast as it gets it, and what the client does not take stays in memory.
Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from typing import Any

from sdbento.doors.network.limits import Limits


class Outgoing:
    """As `transport`, and counts what is written to it."""

    def __init__(self, transport: asyncio.Transport, limits: Limits) -> None:
        self._transport = transport
        self._limits = limits
        self._written = self._taken = 0  # bytes
        self._mark = 0  # what had been written at an earlier look, and is not all taken
        self._patience = limits.send_seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)

    def untaken(self) -> int:
        """Bytes in this process or in the kernel, for the client's host has not acknowledged them.

        Without those in the kernel, a slow client would seem to take nothing for a long time, and
        then a megabyte at once: the kernel asks for more only when a third of its buffer is free.
        """
        if self._taken == self._written:
            return 0
        return self._transport.get_write_buffer_size() + _in_kernel(self._transport)

    def is_behind(self) -> bool:
        """Whether the client is slower than it should be at present."""
        return self._patience < self._limits.send_seconds

    def is_stuck(self, elapsed: float) -> bool:
        """Whether the client has been too slow for too long. To be asked now and then, with the
        seconds since the last time.

        It may be as slow as the answer itself: all that counts is that it takes what there is. So
        it is in time whenever it has taken what was there at an earlier look.
        """
        before, self._taken = self._taken, max(self._taken, self._written - self.untaken())
        if self._taken >= self._mark:
            self._mark = self._written
            self._patience = self._limits.send_seconds
        else:
            gained = (self._taken - before) / self._limits.send_rate
            self._patience = min(self._patience + gained - elapsed, self._limits.send_seconds)
        return self._patience < 0


def _in_kernel(transport: asyncio.Transport) -> int:
    """Bytes that the kernel has not sent, or that were not acknowledged. 0 where it does not say:
    only Linux does."""
    try:
        descriptor = transport.get_extra_info("socket").fileno()
        (num_bytes,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))
    except (AttributeError, OSError, ValueError):
        return 0
    return int(num_bytes)
