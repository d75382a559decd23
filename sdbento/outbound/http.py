"""Fetches from and sends to URLs that requests name. See the package for what is checked.

Knows nothing of images, LoRAs and jobs: it receives and sends bytes.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from io import BytesIO
from typing import Literal

import httpcore
import httpx

from sdbento import __version__
from sdbento.access.caller import current_caller
from sdbento.access.places import HostPlaces, SharedBytes, TimeLimit
from sdbento.errors import TooLarge
from sdbento.outbound.addresses import Address, site
from sdbento.outbound.failures import FAILURES, Failed, explained
from sdbento.outbound.names import resolve
from sdbento.outbound.urls import check, check_addresses, host_of, join, parse
from sdbento.settings import Settings

CONNECTIONS = 256  # at once
CONNECTIONS_TO_A_HOST = 8  # of one caller
MAX_MEMORY = 2**30  # bytes of what is fetched at once
MAX_ADDRESSES = 8  # of a host that are tried
PART_BYTES = 2**16  # of what is sent, at a time
MAX_REDIRECTS = 3
PORTS = {"https": 443, "http": 80}
MAX_DIGITS = 9  # of a Retry-After, which may be any number
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = [
    (b"accept", b"*/*"),
    (b"accept-encoding", b"identity"),  # a few bytes must not unfold into many
    (b"user-agent", f"sdbento/{__version__}".encode()),
]


@dataclass(frozen=True)
class Answer:
    """How a host answered what was sent to it."""

    status: int
    retry_after: float | None  # seconds that it asks to wait

    @property
    def accepted(self) -> bool:
        return 200 <= self.status < 300


@dataclass(frozen=True)
class Body:
    """What is sent, in parts, so that a slow host does not keep all of it in memory."""

    num_bytes: int
    parts: AsyncIterator[bytes]

    @classmethod
    def of(cls, data: bytes) -> Body:
        async def parts() -> AsyncIterator[bytes]:
            for start in range(0, len(data), PART_BYTES):
                yield data[start : start + PART_BYTES]

        return cls(len(data), parts())


class Outbound:
    """Connections for one purpose, shared by all callers: one whose hosts are slow waits for places
    at last, and is refused with LimitReached; others do not notice.

    Cancelling a call closes its connection at once.
    """

    def __init__(self, settings: Settings, max_memory: int = MAX_MEMORY) -> None:
        """max_memory: bytes of what is being fetched."""
        self._settings = settings
        self._places = HostPlaces(CONNECTIONS, CONNECTIONS_TO_A_HOST)
        self._memory = SharedBytes(max_memory, "the memory for what is fetched")

    @asynccontextmanager
    async def fetched(self, url: str, *, max_bytes: int, param: str) -> AsyncIterator[bytes]:
        """The body that `url`, given in the request's field `param`, answers with.

        It counts as the caller's memory until the block ends. Takes at most
        `settings.fetch_timeout` seconds, redirects included, and at most as many more to wait for
        places. Raises TooLarge above `max_bytes`, LimitReached if the caller has too much under
        way, and InvalidParameter for everything else: a URL that does not work is the fault of the
        request, not of the server.
        """
        with self._memory.counting(current_caller()) as count:
            yield await self._fetch(url, max_bytes, count, param)

    async def send(
        self,
        method: Literal["POST", "PUT"],
        url: str,
        body: Body,
        headers: Mapping[str, str],
        *,
        param: str,
    ) -> Answer:
        """Send `body` to `url`, given in the request's field `param`. Takes as long as `fetched`
        may.

        Redirects are not followed. Raises InvalidParameter if there is no answer, LimitReached.
        """
        call = _Call(self._settings, self._places)
        target: httpx.URL | None = None
        try:
            target = parse(url)
            async with call.requested(method, target, headers, body) as response:
                return Answer(response.status, _retry_after(httpx.Headers(response.headers)))
        except FAILURES as error:
            problem = f"{param}: nothing can be sent to"
            raise explained(error, problem, target, self._settings, param) from error

    async def _fetch(
        self, url: str, max_bytes: int, count: Callable[[int], None], param: str
    ) -> bytes:
        call = _Call(self._settings, self._places)
        target: httpx.URL | None = None
        try:
            target = parse(url)
            for _ in range(MAX_REDIRECTS + 1):
                async with call.requested("GET", target) as response:
                    answer = await _body_or_location(target, response, max_bytes, count)
                if isinstance(answer, bytes):
                    return answer
                target = answer
            raise Failed(f"more than {MAX_REDIRECTS} redirects")
        except FAILURES as error:
            problem = f"{param} could not be fetched from"
            raise explained(error, problem, target, self._settings, param) from error


def fetch_blocking(url: str, settings: Settings, *, max_bytes: int, param: str) -> bytes:
    """As `Outbound.fetched`, for a thread without an event loop, whose number limits how many there
    are at once."""

    async def fetch() -> bytes:
        # A share of `max_bytes` would be too little for a large file, and there is only this one.
        return await Outbound(settings)._fetch(url, max_bytes, lambda _: None, param)

    return asyncio.run(fetch())


class _Call:
    """The requests of one call, which share its time."""

    def __init__(self, settings: Settings, places: HostPlaces) -> None:
        self._settings = settings
        self._places = places
        self._caller = current_caller()
        self._time = TimeLimit(settings.fetch_timeout)
        self._patience = TimeLimit(settings.fetch_timeout)

    @asynccontextmanager
    async def requested(
        self,
        method: str,
        target: httpx.URL,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
    ) -> AsyncIterator[httpcore.Response]:
        """The answer to one request, its body not yet read. Raises what is in FAILURES, and
        LimitReached."""
        check(target, self._settings)
        host, port = host_of(target), target.port or PORTS[target.scheme]
        addresses = await resolve(host, port, self._caller, self._time, self._patience)
        check_addresses(addresses, self._settings)
        del addresses[MAX_ADDRESSES:]
        backend = _Backend(addresses, self._settings.fetch_timeout / len(addresses))
        hosts = [host, *map(site, addresses)]
        async with (
            self._places.hold(self._caller, hosts, self._patience),
            self._time.running(),
            httpcore.AsyncConnectionPool(ssl_context=_tls(), network_backend=backend) as pool,
            pool.stream(
                method,
                _url(target),
                headers=_headers(target, headers or {}, body),
                content=None if body is None else body.parts,
            ) as response,
        ):
            yield response


class _Backend(httpcore.AsyncNetworkBackend):
    """Connects to no address but those that were checked, whatever the host's name is.

    httpcore passes the name, and checks the certificate for it later. It is not looked up again, so
    that a second answer cannot lead to an address that was not checked.
    """

    def __init__(self, addresses: list[Address], seconds: float) -> None:
        """seconds: for which each address is tried."""
        self._addresses = addresses
        self._seconds = seconds
        self._sockets = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        *others, last = self._addresses
        for address in others:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._sockets.connect_tcp(str(address), port, self._seconds)
        return await self._sockets.connect_tcp(str(last), port, self._seconds)


@cache
def _tls() -> ssl.SSLContext:
    return httpcore.default_ssl_context()  # the system's authorities and certifi's


def _url(target: httpx.URL) -> httpcore.URL:
    return httpcore.URL(
        scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path
    )


def _headers(
    target: httpx.URL, headers: Mapping[str, str], body: Body | None
) -> list[tuple[bytes, bytes]]:
    sent = [(b"host", target.netloc), *HEADERS]
    sent += [(name.encode(), value.encode()) for name, value in headers.items()]
    if body is not None:
        sent += [(b"content-length", str(body.num_bytes).encode())]
    return sent


async def _body_or_location(
    target: httpx.URL,
    response: httpcore.Response,
    max_bytes: int,
    count: Callable[[int], None],
) -> bytes | httpx.URL:
    """The body, or the URL that the host redirects to."""
    headers = httpx.Headers(response.headers)
    if response.status in REDIRECTS and "location" in headers:
        return join(target, headers["location"])
    if response.status != 200:
        raise Failed(f"the host answered {response.status}")
    if (encoding := headers.get("content-encoding", "identity")) != "identity":
        raise Failed(f"the host sent it compressed ({encoding[:20]}), which is not accepted")
    too_large = Failed(f"it is larger than the limit of {max_bytes} bytes", TooLarge)
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = BytesIO()
    async for part in response.aiter_stream():
        if body.tell() + len(part) > max_bytes:
            raise too_large
        count(len(part))
        body.write(part)
    return body.getvalue()  # no copy of it, as `bytes` would make of a bytearray


def _retry_after(headers: httpx.Headers) -> float | None:
    """The seconds that a Retry-After asks for, as a number or as a date (RFC 9110, 10.2.3)."""
    given = headers.get("retry-after", "")
    if given.isascii() and given.isdigit():
        return float(given[:MAX_DIGITS])
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
