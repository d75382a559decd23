"""The only place that opens a socket for a URL that came with a request.

Such a URL may point at what only this server can reach: its own ports, its neighbours, its cloud's
metadata. So a host is resolved once, all its addresses are checked, and the connection goes to one
of those that were checked; redirects are checked in the same way. No proxy, cookie or credential is
used. Knows nothing of images, LoRAs and jobs: it receives and sends bytes.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from threading import Thread
from typing import Literal

import httpcore
import httpx

from sdbento import __version__
from sdbento.errors import InvalidParameter, SDBentoError, TooLarge
from sdbento.settings import Settings

MAX_REDIRECTS = 3
MAX_PORT = 65535
MAX_HOST_CHARS = 60  # of a host in a message
MAX_DIGITS = 9  # of a Retry-After, which may be any number
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = [
    (b"accept", b"*/*"),
    (b"accept-encoding", b"identity"),  # a few bytes must not unfold into many
    (b"user-agent", f"sdbento/{__version__}".encode()),
]

NAT64 = ip_network("64:ff9b::/96")
GLOBAL_UNICAST = ip_network("2000::/3")  # all that IANA has handed out of IPv6
# Addresses that `ipaddress` calls global in some versions of Python, or that a cloud uses for
# itself.
SPECIAL = [
    ip_network(network)
    for network in (
        "100.64.0.0/10",  # shared by a carrier's customers; Alibaba's metadata
        "168.63.129.16/32",  # Azure's host, at a public address
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata
        "192.88.99.0/24",  # relays of 6to4
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation, like the next
        "3fff::/20",
    )
]

Address = IPv4Address | IPv6Address


class _Failed(Exception):
    """Why a URL cannot be used. `kind` is the error that the caller gets in its place."""

    def __init__(self, reason: str, kind: type[SDBentoError] = InvalidParameter) -> None:
        super().__init__(reason)
        self.kind = kind


FAILURES = (_Failed, httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError)


def is_url(source: str) -> bool:
    """Whether a field that may also hold a name, a data URI or base64 holds a URL."""
    return source.lstrip()[:8].lower().startswith(("https://", "http://"))


def fetch(url: str, settings: Settings, *, max_bytes: int, param: str) -> bytes:
    """The body that `url`, given in the request's field `param`, answers with. Blocks.

    Takes at most `settings.fetch_timeout` seconds, redirects included. Raises TooLarge above
    `max_bytes`, and InvalidParameter for everything else: a URL that does not work is the fault of
    the request, not of the server.
    """
    backend = _CheckedBackend(time.monotonic() + settings.fetch_timeout, settings)
    target: httpx.URL | None = None
    try:
        target = _parse(url)
        for _ in range(MAX_REDIRECTS + 1):
            _check(target, settings)
            answer = _get(target, backend, max_bytes)
            if isinstance(answer, bytes):
                return answer
            target = answer
        raise _Failed(f"more than {MAX_REDIRECTS} redirects")
    except FAILURES as error:
        raise _explained(
            error, f"{param} could not be fetched from", target, settings, param
        ) from error


@dataclass(frozen=True)
class Answer:
    """How a host answered what was sent to it."""

    status: int
    retry_after: float | None  # seconds that it asks to wait

    @property
    def accepted(self) -> bool:
        return 200 <= self.status < 300


def send(
    method: Literal["POST", "PUT"],
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    settings: Settings,
    *,
    param: str,
) -> Answer:
    """Send `body` to `url`, given in the request's field `param`. Blocks as long as `fetch` may.

    Redirects are not followed. Raises InvalidParameter if there is no answer.
    """
    backend = _CheckedBackend(time.monotonic() + settings.fetch_timeout, settings)
    target: httpx.URL | None = None
    try:
        target = _parse(url)
        _check(target, settings)
        with _requested(method, target, backend, headers, body) as response:
            return Answer(response.status, _retry_after(httpx.Headers(response.headers)))
    except FAILURES as error:
        raise _explained(
            error, f"{param}: nothing can be sent to", target, settings, param
        ) from error


def check_fetch(url: str, settings: Settings, *, param: str) -> None:
    """Raise what `fetch` would raise for a URL that it refuses without a connection.

    A host name is not looked up.
    """
    _check_url(url, settings, f"{param} could not be fetched from", param)


def check_send(url: str, settings: Settings, *, param: str) -> None:
    """Raise InvalidParameter for a URL that `send` would refuse without a connection.

    A host name is not looked up.
    """
    _check_url(url, settings, f"{param}: nothing can be sent to", param)


def _check_url(url: str, settings: Settings, problem: str, param: str) -> None:
    target: httpx.URL | None = None
    try:
        target = _parse(url)
        _check(target, settings)
    except _Failed as error:
        raise _explained(error, problem, target, settings, param) from error


def is_global(address: Address) -> bool:
    """Whether `address`, and the IPv4 address it may embed, is on the public internet."""
    if isinstance(address, IPv6Address):
        if (embedded := _embedded(address)) is not None:
            return is_global(embedded)
        if address not in GLOBAL_UNICAST:
            return False
    special = any(address in network for network in SPECIAL)
    return address.is_global and not address.is_multicast and not special


def look_up(host: str, port: int) -> list[str]:
    """The addresses of `host`, best first. Raises OSError or UnicodeError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects to no address that it has not checked, and to none after the deadline.

    httpcore passes the host's name, and checks the certificate for it later. The name is looked up
    here, once, so that a second answer cannot lead to an address that was not checked.
    """

    def __init__(self, deadline: float, settings: Settings) -> None:
        self._deadline = deadline
        self._allow_private = settings.allow_private_urls
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = _resolve(host, port, _remaining(self._deadline))
        _check_addresses(addresses, self._allow_private)
        while True:
            address = addresses.pop(0)
            share = _remaining(self._deadline) / (len(addresses) + 1)
            try:
                stream = self._sockets.connect_tcp(str(address), port, share)
                return _TimedStream(stream, self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if not addresses:
                    raise


class _TimedStream(httpcore.NetworkStream):
    """A connection that ends at the deadline, even if the host keeps sending a byte at a time."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _remaining(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _remaining(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left = _remaining(self._deadline)
        stream = self._stream.start_tls(ssl_context, server_hostname, left)
        return _TimedStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


@cache
def _tls() -> ssl.SSLContext:
    return httpcore.default_ssl_context()  # the system's authorities and certifi's


def _parse(url: str) -> httpx.URL:
    try:
        return httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise _Failed("it is not valid") from error


def _check(target: httpx.URL, settings: Settings) -> None:
    if target.scheme not in ("https", "http") or not target.host:
        raise _Failed("only https URLs are accepted")
    if target.scheme == "http" and not settings.allow_private_urls:
        raise _Failed("http is refused, use https; SDBENTO_ALLOW_PRIVATE_URLS=true permits it")
    if target.port is not None and not 0 < target.port <= MAX_PORT:
        raise _Failed(f"its port is not one of 1 to {MAX_PORT}")
    with suppress(ValueError):  # a host name, which is looked up only to connect to it
        _check_addresses([ip_address(target.host)], settings.allow_private_urls)
    if target.userinfo:
        raise _Failed("a URL must not carry a user name or password")


def _check_addresses(addresses: list[Address], allow_private: bool) -> None:
    if not allow_private and not all(is_global(address) for address in addresses):
        raise _Failed(
            "its address is private or reserved; SDBENTO_ALLOW_PRIVATE_URLS=true permits it"
        )


def _get(target: httpx.URL, backend: _CheckedBackend, max_bytes: int) -> bytes | httpx.URL:
    """The body, or the URL that the host redirects to."""
    with _requested("GET", target, backend) as response:
        answered = httpx.Headers(response.headers)
        if response.status in REDIRECTS and "location" in answered:
            return _join(target, answered["location"])
        if response.status != 200:
            raise _Failed(f"the host answered {response.status}")
        return _read(response, answered, max_bytes)


@contextmanager
def _requested(
    method: str,
    target: httpx.URL,
    backend: _CheckedBackend,
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> Iterator[httpcore.Response]:
    """The answer to one request, its body not yet read."""
    url = httpcore.URL(
        scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path
    )
    sent = [(b"host", target.netloc), *HEADERS]
    sent += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    if body is not None:
        sent += [(b"content-length", str(len(body)).encode())]
    with (
        httpcore.ConnectionPool(ssl_context=_tls(), network_backend=backend) as pool,
        pool.stream(method, url, headers=sent, content=body) as response,
    ):
        yield response


def _retry_after(headers: httpx.Headers) -> float | None:
    """The seconds that a Retry-After asks for, as a number or as a date (RFC 9110, 10.2.3)."""
    given = headers.get("retry-after", "")
    if given.isascii() and given.isdigit():
        return float(given[:MAX_DIGITS])
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _join(target: httpx.URL, location: str) -> httpx.URL:
    try:
        return target.join(location)
    except (httpx.InvalidURL, ValueError) as error:
        raise _Failed("it redirects to a URL that is not valid") from error


def _read(response: httpcore.Response, headers: httpx.Headers, max_bytes: int) -> bytes:
    if (encoding := headers.get("content-encoding", "identity")) != "identity":
        raise _Failed(f"the host sent it compressed ({encoding[:20]}), which is not accepted")
    too_large = _Failed(f"it is larger than the limit of {max_bytes} bytes", TooLarge)
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _resolve(host: str, port: int, timeout: float) -> list[Address]:
    """The addresses of `host`. Resolved in a thread, for the system's resolver has no timeout."""
    found: Future[list[str]] = Future()

    def work() -> None:
        try:
            found.set_result(look_up(host, port))
        except Exception as error:
            found.set_exception(error)

    Thread(target=work, name="sdbento-dns", daemon=True).start()
    try:
        return [ip_address(address) for address in found.result(timeout)]
    except TimeoutError as error:
        raise httpcore.ConnectTimeout from error
    except (OSError, ValueError) as error:  # UnicodeError is a ValueError
        raise _Failed("its host name cannot be resolved") from error


def _embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that packets for `address` may be forwarded to."""
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _remaining(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise httpcore.ReadTimeout
    return left


def _short(host: str) -> str:
    return host if len(host) <= MAX_HOST_CHARS else f"{host[:MAX_HOST_CHARS]}…"


def _explained(
    error: Exception, what: str, target: httpx.URL | None, settings: Settings, param: str
) -> SDBentoError:
    kind = error.kind if isinstance(error, _Failed) else InvalidParameter
    host = _short(target.host) if target is not None and target.host else "its URL"
    return kind(f"{what} {host}: {_reason(error, settings)}", param=param)


def _reason(error: BaseException, settings: Settings) -> str:
    if isinstance(error, _Failed):
        return str(error)
    if isinstance(error, httpcore.TimeoutException):
        limit = f"{settings.fetch_timeout:g} seconds (SDBENTO_FETCH_TIMEOUT)"
        return f"it took longer than the limit of {limit}"
    match error.args:  # httpcore hides the cause, but keeps it there
        case [ssl.SSLCertVerificationError() as cause]:
            return f"its certificate was refused: {cause.verify_message.rstrip('.')}"
        case [ssl.SSLError()]:
            return "TLS failed"
        case [ConnectionRefusedError()]:
            return "the connection was refused"
    if isinstance(error, httpcore.ConnectError):
        return "the host cannot be reached"
    return "the host broke off or does not speak HTTP"
