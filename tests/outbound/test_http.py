"""Fetching and posting against a real server on loopback; some tests replace the resolver."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote, unquote

import httpcore
import pytest

from sdbento.access.caller import Caller, acting_for
from sdbento.errors import InvalidParameter, TooLarge
from sdbento.outbound import http, names, urls
from sdbento.outbound.addresses import is_global
from sdbento.outbound.http import MAX_REDIRECTS, Answer, Body, Outbound, fetch_blocking
from sdbento.outbound.names import look_up
from sdbento.outbound.urls import check_send, is_url
from sdbento.settings import Settings
from tests.support.serve_in_thread import serve_in_thread

BODY = bytes(range(256)) * 40
LIMIT = len(BODY)
PRIVATE = Settings(allow_private_urls=True, fetch_timeout=10)
PUBLIC = Settings(allow_private_urls=False, fetch_timeout=10)

# Signed by itself, for the host name pictures.example, until 2126.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgLuSZXks4aJ4fdomU
oJibVC/XIbPgwFfoGj6Up2QsOxChRANCAAS2oA7iH/5KAnP8O/uLyDdRTWe8gDL+
iQeUc6/+EHTEUBjzYgnAaTa1qbf3mGnuJPZMycIHlTzWcZmUf4WshU7f
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBqjCCAVCgAwIBAgIUfrqnp4qbl3CHoG6imvSymih7/88wCgYIKoZIzj0EAwIw
GzEZMBcGA1UEAwwQcGljdHVyZXMuZXhhbXBsZTAgFw0yNjExMjMwOTA4MjRaGA8y
MTI2MTAzMDA5MDgyNFowGzEZMBcGA1UEAwwQcGljdHVyZXMuZXhhbXBsZTBZMBMG
ByqGSM49AgEGCCqGSM49AwEHA0IABLagDuIf/koCc/w7+4vIN1FNZ7yAMv6JB5Rz
r/4QdMRQGPNiCcBpNrWpt/eYae4k9kzJwgeVPNZxmZR/hayFTt+jcDBuMB0GA1Ud
DgQWBBRMU/tf6rMbfXSU1H5h/U0+ymLjEjAfBgNVHSMEGDAWgBRMU/tf6rMbfXSU
1H5h/U0+ymLjEjAPBgNVHRMBAf8EBTADAQH/MBsGA1UdEQQUMBKCEHBpY3R1cmVz
LmV4YW1wbGUwCgYIKoZIzj0EAwIDSAAwRQIhAPwNy0wuf0SuX3hsUFGRGrkak1Ag
DgU4jeU+pRIgKUkzAiAIlA+OkORXJPGPNUbcn4GUEk2gArqV8gFH2t+VgADiiA==
-----END CERTIFICATE-----
"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    body = b""

    def do_GET(self) -> None:
        self.server.seen.append(self)
        name, _, argument = self.path.strip("/").partition("/")
        try:
            getattr(self, f"_{name}")(argument)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # half of the tests need it

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _image(self, argument: str) -> None:
        self._answer(200, {}, BODY)

    def _long(self, argument: str) -> None:
        self._answer(200, {"Content-Length": str(int(argument) * LIMIT)})
        for _ in range(int(argument)):
            self.wfile.write(BODY)

    def _status(self, argument: str) -> None:
        self._answer(int(argument), {})

    def _wait(self, argument: str) -> None:
        self._answer(503, {"Retry-After": unquote(argument)})

    def _redirect(self, argument: str) -> None:
        self._answer(302, {"Location": argument})

    def _down(self, argument: str) -> None:
        self._answer(307, {"Location": f"/down/{int(argument) - 1}" if int(argument) else "/image"})

    def _boasting(self, argument: str) -> None:
        self._answer(200, {"Content-Length": str(LIMIT + 1)})

    def _cut(self, argument: str) -> None:
        self._answer(200, {"Content-Length": "100"}, b"only this")
        self.close_connection = True

    def _gzip(self, argument: str) -> None:
        self._answer(200, {"Content-Encoding": "gzip"}, BODY)

    def _endless(self, argument: str) -> None:
        self._start_chunks()
        while True:
            self._chunk(BODY)

    def _trickle(self, argument: str) -> None:
        self._start_chunks()
        while True:
            self._chunk(b"x")
            time.sleep(0.02)

    def _header(self, argument: str) -> None:
        while True:
            self.wfile.write(b"H")
            time.sleep(0.02)

    def _start_chunks(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[Handler] = []
        self.names: list[str | None] = []  # that TLS clients asked for

    @property
    def at(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # tests have clients that hang up


@pytest.fixture
def server() -> Iterator[Server]:
    with serve_in_thread(Server()) as server:
        yield server


@pytest.fixture
def tls_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server as pictures.example, whose certificate is trusted."""
    file = tmp_path / "certificate.pem"
    file.write_text(CERTIFICATE)
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    context.sni_callback = lambda _socket, name, _context: server.names.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    trusting = ssl.create_default_context(cafile=str(file))
    monkeypatch.setattr(http, "_tls", lambda: trusting)
    with serve_in_thread(server):
        yield server


Resolve = Callable[..., list[str]]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Make every host name resolve to the given addresses; returns the names looked up so far."""

    def answer_with(*addresses: str) -> list[str]:
        asked: list[str] = []

        def stand_in(host: str, port: int) -> list[str]:
            asked.append(host)
            return list(addresses)

        monkeypatch.setattr(names, "look_up", stand_in)
        return asked

    return answer_with


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts to which a connection is attempted; none is made."""
    tried: list[str] = []

    async def stand_in(self: object, host: str, *args: object) -> httpcore.AsyncNetworkStream:
        tried.append(host)
        raise httpcore.ConnectError

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", stand_in)
    return tried


async def fetch(outbound: Outbound, url: str) -> bytes:
    async with outbound.fetched(url, max_bytes=LIMIT, param="image") as body:
        return body


def get(url: str, settings: Settings = PRIVATE) -> bytes:
    return asyncio.run(fetch(Outbound(settings), url))


def refusal(url: str, settings: Settings = PRIVATE) -> str:
    with pytest.raises(InvalidParameter) as caught:
        get(url, settings)
    assert caught.value.param == "image"
    return caught.value.message


# What works


def test_the_body_is_returned(server: Server) -> None:
    assert get(f"http://{server.at}/image") == BODY


def test_a_body_is_in_memory_once(server: Server) -> None:
    async def fetch_long() -> None:
        size, url = 300 * LIMIT, f"http://{server.at}/long/300"
        async with Outbound(PRIVATE).fetched(url, max_bytes=size, param="image") as body:
            assert len(body) == size

    tracemalloc.start()
    try:
        asyncio.run(fetch_long())
        assert tracemalloc.get_traced_memory()[1] < 1.5 * 300 * LIMIT
    finally:
        tracemalloc.stop()


def test_a_fetch_that_is_alone_may_have_all_the_bytes_of_its_limit(server: Server) -> None:
    with acting_for(Caller("alice", shares=True)):
        url = f"http://{server.at}/long/100"
        assert fetch_blocking(url, PRIVATE, max_bytes=100 * LIMIT, param="lora") == 100 * BODY


def test_redirects_are_followed(server: Server) -> None:
    assert get(f"http://{server.at}/down/{MAX_REDIRECTS - 1}") == BODY


def test_a_fetch_sends_few_headers_and_ignores_proxies(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    get(f"http://{server.at}/image")
    (seen,) = server.seen
    assert seen.headers["Accept-Encoding"] == "identity"
    assert {name.lower() for name in seen.headers} == {
        "host", "accept", "accept-encoding", "user-agent"
    }  # fmt: skip


def test_the_connection_goes_to_the_address_that_was_looked_up_once(
    server: Server, resolve: Resolve
) -> None:
    asked = resolve("127.0.0.1")
    assert get(f"http://pictures.example:{server.server_port}/image") == BODY
    assert asked == ["pictures.example"]
    assert server.seen[0].headers["Host"] == f"pictures.example:{server.server_port}"


def test_the_next_address_is_tried_when_one_refuses(server: Server, resolve: Resolve) -> None:
    resolve("127.0.0.2", "127.0.0.1")
    assert get(f"http://pictures.example:{server.server_port}/image") == BODY


def test_the_certificate_is_checked_against_the_name(tls_server: Server, resolve: Resolve) -> None:
    resolve("127.0.0.1")
    assert get(f"https://pictures.example:{tls_server.server_port}/image") == BODY
    assert tls_server.names == ["pictures.example"]


# Where it must not go


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.9.9.9",
        "168.63.129.16", "169.254.169.254", "172.16.0.1", "192.0.0.192", "192.0.2.1",
        "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1",
        "239.255.255.250", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::1",
        "2002:a9fe:a9fe::", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1",
        "fe80::1%2", "fec0::1", "ff02::1", "ff0e::1",
    ],
)  # fmt: skip
def test_a_private_or_reserved_address_is_not_connected_to(
    address: str, resolve: Resolve, connected: list[str]
) -> None:
    assert not is_global(ip_address(address))
    resolve(address)
    message = refusal("https://pictures.example/a.png", PUBLIC)
    assert "pictures.example" in message and "SDBENTO_ALLOW_PRIVATE_URLS" in message
    assert connected == []


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1", "93.184.215.14", "172.32.0.1", "192.0.1.1", "2606:4700::1111",
        "2a00:1450:4001::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1",
    ],
)  # fmt: skip
def test_a_public_address_is_connected_to(
    address: str, resolve: Resolve, connected: list[str]
) -> None:
    asked = resolve(address)
    assert "cannot be reached" in refusal("https://pictures.example/a.png", PUBLIC)
    assert asked == ["pictures.example"]
    assert connected == [str(ip_address(address))]


def test_one_private_address_among_public_ones_is_one_too_many(
    resolve: Resolve, connected: list[str]
) -> None:
    resolve("93.184.215.14", "10.0.0.1")
    assert "private" in refusal("https://pictures.example/", PUBLIC)
    assert connected == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "127.1", "localhost"]
)
def test_loopback_is_recognised_however_it_is_written(host: str, connected: list[str]) -> None:
    assert "could not be fetched" in refusal(f"https://{host}/", PUBLIC)
    assert connected == []


def test_http_is_refused(connected: list[str]) -> None:
    message = refusal("http://pictures.example/a.png", PUBLIC)
    assert "use https" in message and "SDBENTO_ALLOW_PRIVATE_URLS" in message
    assert connected == []


@pytest.mark.parametrize(
    "url",
    [
        "", "pictures.example/a.png", "ftp://pictures.example/a", "file:///etc/passwd", "https://",
        "https:///a.png", "https://[::1", "https://pictures.example:port/", "https://a b/\x00",
        "https://127.0.0.1:65536/",
        "https://" + "a" * 70 + ".example/", "https://a..example/", "https://" + "x" * 100_000,
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_fetched_is_refused_briefly(url: str, connected: list[str]) -> None:
    assert len(refusal(url)) < 250
    assert connected == []


def test_credentials_in_a_url_are_refused(connected: list[str]) -> None:
    message = refusal("https://alice:secret@pictures.example/")
    assert "password" in message and "secret" not in message
    assert connected == []


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("https://10.0.0.1/", "private"),
        ("http://93.184.215.14/", "use https"),
        ("https://bob@93.184.215.14/", "user name"),
        ("//[::1]/", "private"),
        ("https://93.184.215.14:port/", "not valid"),
    ],
)
def test_a_redirect_is_checked_like_the_first_url(
    target: str,
    reason: str,
    tls_server: Server,
    resolve: Resolve,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = tls_server.server_port
    monkeypatch.setattr(  # loopback counts as public, but under this name only
        names, "look_up", lambda host, _: ["127.0.0.1"] if host.endswith("le") else [host]
    )
    monkeypatch.setattr(
        urls, "is_global", lambda address: str(address) == "127.0.0.1" or is_global(address)
    )
    assert reason in refusal(f"https://pictures.example:{port}/redirect/{target}", PUBLIC)
    assert len(tls_server.seen) == 1


def test_too_many_redirects_are_refused(server: Server) -> None:
    assert f"more than {MAX_REDIRECTS} redirects" in refusal(f"http://{server.at}/down/50")
    assert len(server.seen) == MAX_REDIRECTS + 1


# What is too much


@pytest.mark.parametrize("path", ["boasting", "endless"])
def test_too_many_bytes_are_refused_by_header_and_while_reading(path: str, server: Server) -> None:
    with pytest.raises(TooLarge, match=f"limit of {LIMIT} bytes") as caught:
        get(f"http://{server.at}/{path}")
    assert caught.value.param == "image"


@pytest.mark.parametrize("path", ["trickle", "header"])
def test_a_slow_trickle_times_out(path: str, server: Server) -> None:
    settings = Settings(allow_private_urls=True, fetch_timeout=0.3)
    started = time.monotonic()
    assert "0.3 seconds (SDBENTO_FETCH_TIMEOUT)" in refusal(f"http://{server.at}/{path}", settings)
    assert time.monotonic() - started < 5


def test_a_resolver_that_does_not_answer_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang(host: str, port: int) -> list[str]:
        released.wait(10)
        return ["127.0.0.1"]

    monkeypatch.setattr(names, "look_up", hang)
    settings = Settings(allow_private_urls=True, fetch_timeout=0.1)
    assert "SDBENTO_FETCH_TIMEOUT" in refusal("http://pictures.example/", settings)
    released.set()


def test_compression_is_refused(server: Server) -> None:
    assert "compressed (gzip)" in refusal(f"http://{server.at}/gzip")


# What does not work


@pytest.mark.parametrize("status", [204, 304, 401, 404, 500])
def test_other_answers_are_reported(status: int, server: Server) -> None:
    message = refusal(f"http://{server.at}/status/{status}")
    assert message.endswith(f"from 127.0.0.1: the host answered {status}")


def test_a_refused_connection_is_reported() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        assert "was refused" in refusal(f"http://127.0.0.1:{taken.getsockname()[1]}/")


def test_an_unknown_host_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "not known")

    monkeypatch.setattr(names, "look_up", fail)
    assert "cannot be resolved" in refusal("https://nowhere.example/")


def test_a_truncated_answer_is_reported(server: Server) -> None:
    assert "broke off" in refusal(f"http://{server.at}/cut")


def test_a_certificate_for_another_name_is_refused(tls_server: Server, resolve: Resolve) -> None:
    resolve("127.0.0.1")
    message = refusal(f"https://other.example:{tls_server.server_port}/image")
    assert "certificate was refused" in message and "mismatch" in message


def test_a_certificate_of_an_unknown_authority_is_refused(
    tls_server: Server, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "_tls", httpcore.default_ssl_context)
    resolve("127.0.0.1")
    message = refusal(f"https://pictures.example:{tls_server.server_port}/image")
    assert "certificate was refused" in message


def test_a_host_without_tls_is_reported(server: Server) -> None:
    assert "TLS failed" in refusal(f"https://{server.at}/image")


def test_the_real_resolver_knows_literals() -> None:
    assert look_up("127.0.0.1", 80) == ["127.0.0.1"]
    assert look_up("::1", 80) == ["::1"]


# What is sent


def sent(url: str, settings: Settings = PRIVATE) -> Answer:
    headers = {"content-type": "application/json", "x-event": "ended"}
    body = Body.of(b'{"id": "a"}')
    sending = Outbound(settings).send("POST", url, body, headers, param="webhook")
    return asyncio.run(sending)


def send_refusal(url: str, settings: Settings = PRIVATE) -> str:
    with pytest.raises(InvalidParameter, match="webhook: nothing can be sent to") as caught:
        sent(url, settings)
    assert caught.value.param == "webhook"
    return caught.value.message


@pytest.mark.parametrize("path", ["image", "status/204"])
def test_a_body_is_sent(path: str, server: Server) -> None:
    assert sent(f"http://{server.at}/{path}").accepted
    (seen,) = server.seen
    assert (seen.command, seen.body) == ("POST", b'{"id": "a"}')
    assert {name.lower() for name in seen.headers} == {
        "host", "accept", "accept-encoding", "user-agent", "content-type", "content-length",
        "x-event",
    }  # fmt: skip


@pytest.mark.parametrize("status", [302, 400, 500])
def test_a_status_that_refuses_is_no_error(status: int, server: Server) -> None:
    answer = sent(f"http://{server.at}/status/{status}")
    assert answer == Answer(status, None) and not answer.accepted


def test_no_redirect_is_followed_with_a_body(server: Server) -> None:
    assert sent(f"http://{server.at}/redirect/http://{server.at}/image").status == 302
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("120", 120), ("0", 0), ("9" * 400, 999_999_999), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)
def test_a_host_may_ask_to_wait(given: str, seconds: float, server: Server) -> None:
    assert sent(f"http://{server.at}/wait/{quote(given)}") == Answer(503, seconds)


@pytest.mark.parametrize("given", ["soon", "-5", "1.5", "", "Wed, 99 Oct 2015", "0x10"])
def test_what_is_no_number_of_seconds_is_ignored(given: str, server: Server) -> None:
    assert sent(f"http://{server.at}/wait/{quote(given)}") == Answer(503, None)


def test_what_is_sent_is_checked_like_a_fetch(resolve: Resolve, connected: list[str]) -> None:
    resolve("10.0.0.1")
    assert "private" in send_refusal("https://listener.example/", PUBLIC)
    assert "use https" in send_refusal("http://listener.example/", PUBLIC)
    assert connected == []


def test_sending_times_out(server: Server) -> None:
    settings = Settings(allow_private_urls=True, fetch_timeout=0.3)
    assert "SDBENTO_FETCH_TIMEOUT" in send_refusal(f"http://{server.at}/header", settings)


def test_a_url_can_be_checked_without_a_connection(resolve: Resolve) -> None:
    asked = resolve("93.184.215.14")
    check_send("https://listener.example/", PUBLIC, param="webhook")
    check_send("https://93.184.215.14:8443/", PUBLIC, param="webhook")
    nowhere = ["nonsense", "ftp://a.example/", "http://a.example/", "https://b:c@a.example/"]
    nowhere += ["https://a.example:0/", "https://a.example:65536/", "https://a.example:-1/"]
    private = ["https://127.0.0.1/", "https://169.254.169.254/latest", "https://[::1]:8443/"]
    for url in nowhere + private:
        with pytest.raises(InvalidParameter, match="webhook: nothing can be sent to"):
            check_send(url, PUBLIC, param="webhook")
    for url in private:
        check_send(url, PRIVATE, param="webhook")
    with pytest.raises(InvalidParameter, match="its URL: only https"):
        check_send("https://", PUBLIC, param="webhook")
    assert asked == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("https://a.example/x.png", True),
        ("HTTP://a.example", True),
        ("data:image/png;base64,AAAA", False),
        ("aHR0cHM6Ly8=", False),
        ("owner/https", False),
        ("", False),
    ],
)
def test_urls_are_distinguished_from_names_and_data(source: str, expected: bool) -> None:
    assert is_url(source) is expected
