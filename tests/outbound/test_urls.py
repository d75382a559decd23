"""URLs that no client should send: each is refused by name, whatever the libraries make of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import httpcore
import pytest

from sdbento.errors import InvalidParameter
from sdbento.outbound import names
from sdbento.outbound.http import Outbound
from sdbento.outbound.urls import registered_name
from sdbento.settings import Settings

PUBLIC, PRIVATE = Settings(), Settings(allow_private_urls=True, fetch_timeout=10)
ODD = [
    "https://xn--/", "https://xn--a/", "https://xn--zzzzzz99999.com/", "https://a..b/", "https://.a/",
    f"https://{'a' * 64}.com/", f"https://{'a.' * 150}com/", "https://[::1%25eth0]/",
    "http://[::1%25eth0]/", "https://[fe80::1%25]/", "https://[::1]x/", "https://a。。b/",
    "https://a.b:99999999999/", "https://a.b:٣/", "https://a\tb/", "https://a\nb/", "https://a\0b/",
    "https://a b/", "https://%00/", "https://%/", "https://exa℀mple.com/", "https://ß。𝕏/\ud800",
    "https://\u202e/", "https://-/", "https://_/", "https://../", "https://a.:b@c/",
    "https:\\\\a\\b", "https://0x7f.1/", "https://127。0。0。1/", "https://①②⑦.1/", "https://[v1.a]/",
    "https://[",
]  # fmt: skip
PARTS = [
    "xn--", "xn--a", "a", "..", ".", "example.com", "[::1%25eth0]", "[::1]", "[", "]", "%00", "%2e",
    "%", "@", ":", ":99999", ":-1", ":443", "\\", "/", "?", "#", "\t", "\r\n", "\0", "é", "ß", "。",
    "𝕏", "\ud800", "\u202e", "١٢٧", "0x7f.1", "2130706433", "*", "<", '"', "a" * 64, "-", "_", " ",
    "b." * 130,
]  # fmt: skip


def generated(num: int) -> Iterator[str]:
    draw = random.Random(7)
    for _ in range(num):
        scheme = draw.choice(["https://", "http://", "HTTPS://", "https:/", "https:"])
        host = "".join(draw.choice(PARTS) for _ in range(draw.randint(0, 4)))
        yield scheme + host + draw.choice(["", "/", "/a.png", ":443/", "?q=ü", "/\n"])


async def fetch(url: str, settings: Settings) -> None:
    async with Outbound(settings).fetched(url, max_bytes=1000, param="image"):
        pass


@pytest.mark.parametrize("url", ODD)
def test_an_odd_url_is_refused_and_named(url: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        asyncio.run(fetch(url, PUBLIC))
    assert caught.value.param == "image"


async def test_thousands_of_odd_urls_are_refused_or_their_host_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Names are taken to exist, and their host hangs up before it says anything."""
    connected = 0
    sockets = httpcore.AnyIOBackend.connect_tcp

    async def connect(
        self: httpcore.AnyIOBackend, *_: object, **__: object
    ) -> httpcore.AsyncNetworkStream:
        nonlocal connected
        connected += 1
        return await sockets(self, "127.0.0.1", port)

    host = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1")
    port = host.sockets[0].getsockname()[1]
    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    monkeypatch.setattr(names, "look_up", lambda *_: ["127.0.0.1"])
    for url in generated(4000):
        with pytest.raises(InvalidParameter) as caught:
            await fetch(url, PRIVATE)
        assert caught.value.param == "image"
    assert 50 < connected < 2000
    host.close()


@pytest.mark.parametrize(
    ("host", "registered"),
    [
        ("a.evil.example", "evil.example"), ("evil.example", "evil.example"),
        ("A.B.Evil.Example.", "evil.example"), ("a.b.co.uk", "b.co.uk"), ("x.y.abc.io", "abc.io"),
        ("localhost", "localhost"), ("co.uk", "co.uk"),
    ],
)  # fmt: skip
def test_names_of_one_domain_are_told(host: str, registered: str) -> None:
    assert registered_name(host) == registered
