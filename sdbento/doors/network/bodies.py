"""Reads the bodies of requests, each up to a limit, and bounds what all of them take together.

A body counts from its first byte until its request has been answered: images wait in it for their
turn. How long a body may take to come is for `protocol` to watch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import Receive

from sdbento.access.limits import Places, has_share
from sdbento.errors import TooLarge, Unavailable

# Times the largest body. A single client gets half, so that of the largest there can be 8.
BODIES_AT_ONCE = 16
# A body of so many bytes is always taken: prompts go on while others send images. There are no more
# of those at once than there are connections.
SMALL_BODY = 64 * 1024
RETRY_AFTER = 5.0  # seconds


class ClientGone(Exception):
    """The client left before it had sent its request."""


class Bodies:
    """All bodies that are being read or answered, for one event loop."""

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: of one body."""
        self.max_bytes = max_bytes
        self._places = Places(BODIES_AT_ONCE * max_bytes)  # bytes

    @contextmanager
    def share(self, owner: str | None) -> Iterator[Share]:
        """For the body of one request; `owner` is who sends it."""
        share = Share(self, owner)
        try:
            yield share
        finally:
            self._places.change(owner, -share.size)

    def take(self, owner: str | None, size: int, *, required: bool) -> None:
        """Count `size` bytes more. Raises Unavailable if they are not `required` to be taken."""
        places = self._places
        if not (required or has_share(places.taken[owner], places.total, places.limit, size)):
            raise Unavailable(
                "the bodies of other requests take up the memory there is for them; try again "
                "later",
                retry_after=RETRY_AFTER,
            )
        places.change(owner, size)


class Share:
    """What the body of one request takes of all `bodies`: `size` bytes."""

    def __init__(self, bodies: Bodies, owner: str | None) -> None:
        self.size = 0
        self._bodies = bodies
        self._owner = owner

    async def read(self, headers: Headers, receive: Receive) -> bytes:
        """The body. Raises TooLarge, Unavailable, ClientGone."""
        body = bytearray()
        await self._receive(headers, receive, body)
        return bytes(body)

    async def discard(self, headers: Headers, receive: Receive) -> None:
        """Wait for a body that nobody reads. Raises TooLarge, ClientGone."""
        await self._receive(headers, receive, None)

    async def _receive(self, headers: Headers, receive: Receive, body: bytearray | None) -> None:
        limit = self._bodies.max_bytes
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(int(declared), limit)
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(chunk)
            if size > limit:
                raise _too_large(size, limit)
            if body is not None:
                self._take(chunk)
                body += chunk

    def _take(self, chunk: bytes) -> None:
        small = self.size + len(chunk) <= SMALL_BODY
        self._bodies.take(self._owner, len(chunk), required=small)
        self.size += len(chunk)


def _too_large(size: int, limit: int) -> TooLarge:
    return TooLarge(
        f"the body may have at most {limit} bytes (SDBENTO_MAX_BODY_BYTES); given: {size} or more"
    )
