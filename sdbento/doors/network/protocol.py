"""HTTP/1.1 as uvicorn speaks it by httptools, with the bounds that httptools and uvicorn lack.

Heads, trailers and chunk extensions of any length would be read, and whoever sends nothing, or
takes nothing, would be waited for without end. Knows nothing of routes. What is refused here is
answered as JSON in our own shape of errors, and the connection is closed.
"""

from __future__ import annotations

import asyncio
from functools import partial
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sdbento.access.addresses import client_address
from sdbento.doors.error_shape import error_response
from sdbento.doors.network.connections import Connections
from sdbento.doors.network.limits import Limits
from sdbento.doors.network.outgoing import Outgoing
from sdbento.errors import MalformedRequest, SDBentoError, Unavailable

CHUNK_OVERHEAD = 16  # bytes of framing for each byte of a chunked body; one by one it takes 6
RETRY_AFTER = 5.0  # seconds


def bounded(limits: Limits) -> type[asyncio.Protocol]:
    """What uvicorn is to make for each connection to one port."""
    make: Any = partial(BoundedConnection, limits, Connections(limits))
    return cast(type[asyncio.Protocol], make)


class BoundedConnection(HttpToolsProtocol):
    """One connection, which `connections` keeps an eye on."""

    def __init__(self, limits: Limits, connections: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False  # BentoML writes one
        self.ws_protocol_class = None  # no door speaks it
        self.owner: str | None = None
        self._limits = limits
        self._others = connections
        self._fault: SDBentoError | None = None  # what a callback of the parser refuses
        self._discarding = False  # it has been refused; what still comes is not looked at
        self._ended = False  # a message has, among the data that are being parsed
        self._in_message = False
        self._in_body = False
        self._num_headers = self._head_bytes = 0
        self._received = self._body_bytes = 0  # of the present message, with and without framing
        self._patience = limits.head_seconds  # for what the client has to send next

    # What asyncio calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._outgoing = Outgoing(transport, self._limits)
        super().connection_made(cast(asyncio.Transport, self._outgoing))
        self.owner = client_address(self.client[0] if self.client else None, (), ())
        if not self._others.admit(self):
            message = "too many connections are open; close some, or try again later"
            self._refuse(Unavailable(message, retry_after=RETRY_AFTER))

    def connection_lost(self, exc: Exception | None) -> None:
        self._others.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._discarding:
            return
        self._ended = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # answered as if it had not been asked for
        except httptools.HttpParserError:
            self._refuse(self._fault or MalformedRequest("this is not a request of HTTP/1.1"))
            return
        if not self._ended:  # else some of it belongs to the message before
            self._received += len(data)
        framing = self._received - self._body_bytes
        if framing > self._limits.head_bytes + CHUNK_OVERHEAD * self._body_bytes:
            self._refuse(self._head_too_large())

    def pause_writing(self) -> None:
        super().pause_writing()
        self.loop.call_soon(self._others.bound_untaken)  # not here: it may close this connection

    # What the parser calls. An error that is raised here ends `feed_data`.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_message, self._in_body = True, False
        self._num_headers = self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self._limits.url_bytes:
            limit = self._limits.url_bytes
            self._fail(MalformedRequest(f"the URL may have at most {limit} bytes"), 414)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of the head, or of the trailers of a chunked body."""
        self._num_headers += 1
        self._head_bytes += len(name) + len(value)
        if self._num_headers > self._limits.headers or self._head_bytes > self._limits.head_bytes:
            self._fail(self._head_too_large())
        if name.lower() == b"content-type" and not value.isascii():  # BentoML's access log fails
            self._fail(MalformedRequest("the Content-Type may have ASCII characters only"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._check_head()
        if len(self.pipeline) >= self._limits.pipelined:
            self._fail(MalformedRequest("too many requests were sent without waiting for answers"))
        super().on_headers_complete()
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # the parser reads no more of this connection
        self._in_body = True
        self._patience = self._limits.body_seconds

    def _check_head(self) -> None:
        """What RFC 9112 forbids because a proxy in between may read it otherwise."""
        hosts = [value for name, value in self.headers if name == b"host"]
        version = self.parser.get_http_version()
        if len(hosts) > 1 or (not hosts and version == "1.1"):
            self._fail(MalformedRequest("a request must have one Host header"))
        named = urlsplit(self.url.decode("latin-1")).netloc
        if named and hosts and named.lower() != hosts[0].decode("latin-1").lower():
            self._fail(MalformedRequest("the URL and the Host header name different hosts"))
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if codings and [coding.strip().lower() for coding in codings] != [b"chunked"]:
            self._fail(MalformedRequest("Transfer-Encoding may only be chunked"), 501)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        gained = len(body) / self._limits.body_rate
        self._patience = min(self._patience + gained, self._limits.body_seconds)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = self._in_body = False
        self._ended = True
        self._received = self._body_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_answering():  # no other request was sent meanwhile
            unread = self._in_body
            self._patience = self._limits.linger_seconds if unread else self._limits.head_seconds

    # What `Connections` calls.

    def spare(self) -> int | None:
        if self._outgoing.is_behind():
            return 2
        if self._is_sending() or self.pipeline:
            return None
        if not self._is_answering():
            return 0
        return 1 if self._in_body else None

    def untaken(self) -> int:
        return self._outgoing.untaken()

    def drop(self) -> None:
        """Close without a word. The transport tells of it only later: the application, which may
        be about to answer, must know at once."""
        cycles = [cycle for cycle, _ in self.pipeline]
        for cycle in [self.cycle, *cycles] if self.cycle is not None else cycles:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.abort()

    def check(self, elapsed: float) -> None:
        if self._outgoing.is_stuck(elapsed):
            self.drop()
        elif self._is_client_awaited():
            self._patience -= elapsed
            if self._patience < 0:
                self._give_up()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _is_sending(self) -> bool:
        return self.transport.get_write_buffer_size() > 0

    def _is_client_awaited(self) -> bool:
        if self.timeout_keep_alive_task is not None:  # uvicorn waits for it
            return False
        if self._discarding or not self._is_answering():
            return not self._is_sending()
        return self._in_body and not (
            self.flow.read_paused or self.cycle.waiting_for_100_continue  # it waits for us
        )

    def _give_up(self) -> None:
        if self._discarding or (self._in_body and not self._is_answering()):
            self.drop()
        elif self._in_message:
            what = "body" if self._in_body else "head"
            error = MalformedRequest(f"the {what} of the request came too slowly, or not at all")
            error.status = HTTPStatus.REQUEST_TIMEOUT
            self._refuse(error)
        else:
            self.transport.close()

    # How it refuses.

    def _head_too_large(self) -> MalformedRequest:
        error = MalformedRequest(
            f"the head of a request may have at most {self._limits.headers} headers and "
            f"{self._limits.head_bytes} bytes, and its trailers and chunk extensions as well"
        )
        error.status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        return error

    def _fail(self, error: SDBentoError, status: int | None = None) -> None:
        """End parsing; the parser does not pass the error on."""
        error.status = status or error.status
        self._fault = error
        raise error

    def _refuse(self, error: SDBentoError) -> None:
        """Answer with `error`, unless an answer has begun, and close the connection.

        The client may still be sending. If the connection were closed at once, it would be told
        that it was reset, and lose the answer.
        """
        self._discarding = True
        if self.pipeline or (self._is_answering() and not self._owes_the_first_word()):
            self.drop()
            return
        if self._is_answering():
            self.cycle.disconnected = True  # for the application, the client is gone
            self.cycle.message_event.set()
        self._patience = self._limits.linger_seconds
        self.flow.resume_reading()
        self.transport.write(_as_bytes(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _owes_the_first_word(self) -> bool:
        """Whether the message that is being read is the one to be answered, and is not yet."""
        return self._in_body and not self.cycle.response_started


def _as_bytes(error: SDBentoError) -> bytes:
    response = error_response(error)
    phrase = HTTPStatus(response.status_code).phrase
    lines = [f"HTTP/1.1 {response.status_code} {phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    lines += [b"connection: close", b"", bytes(response.body)]
    return b"\r\n".join(lines)
