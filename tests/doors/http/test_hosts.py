"""Names under which a server without keys may be asked: no page can take one for itself."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdbento.doors.http import hosts
from sdbento.errors import Forbidden
from sdbento.settings import Settings
from tests.doors.http.test_gate import BEARER, KEY, client

EVIL = {"Host": "evil.example:3000"}
# What a browser sends of itself, without TLS and with it.
PLAIN = {"Accept-Language": "en-US,en;q=0.9", "Accept-Encoding": "gzip, deflate"}
TLS = {"Accept-Language": "en", "Accept-Encoding": "gzip, br", "Sec-Fetch-Site": "same-origin"}


@pytest.fixture(params=[False, True], ids=["loopback", "exposed"])
def exposed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(hosts, "is_exposed", lambda port: request.param)
    monkeypatch.setattr(socket, "gethostname", lambda: "GPU1.example.com")
    return bool(request.param)


async def status(method: str, headers: dict[str, str], path: str = "/", **settings: Any) -> int:
    async with client(**settings) as ask:
        return (await ask.request(method, path, headers=headers)).status_code


@pytest.mark.parametrize(
    "path", ["/", "/generate", "/metrics", "/v1/images", "/files/a", "/nothing"]
)
async def test_a_page_whose_name_was_made_to_lead_here_can_send_and_read_nothing(
    exposed: bool, path: str
) -> None:
    page = PLAIN | EVIL
    for method in ("GET", "HEAD", "POST", "OPTIONS", "PUT"):
        refused = 418 if path.startswith("/v1/") else 403
        for more in ({}, BEARER, {"Sec-Fetch-Mode": "cors", "X-Forwarded-Host": "localhost"}):
            assert await status(method, page | more, path) == refused
        origin = {"Origin": "http://evil.example:3000"}
        assert await status(method, EVIL | origin, path) == refused


async def test_the_answer_names_the_setting_and_what_to_put_there(exposed: bool) -> None:
    async with client() as ask:
        answer = await ask.get("/", headers=PLAIN | EVIL)
    message = answer.json()["error"]["message"]
    assert "'evil.example'" in message and "SDBENTO_ALLOWED_HOSTS" in message
    assert await status("GET", PLAIN | EVIL, allowed_hosts="evil.example") == 200


@pytest.mark.parametrize(
    "host",
    [
        "localhost:3000", "LOCALHOST", "localhost.:3000", "sd.localhost", "127.0.0.1", "127.1:3000",
        "192.0.2.7:3000", "[::1]:3000", "[fe80::1]", "sdbento:3000", "host.docker.internal:3000",
        "sdbento.default.svc.cluster.local", "box.lan", "gpu1.example.com:3000", "",
        "public.example",
    ],
)  # fmt: skip
async def test_names_that_nobody_else_can_have_are_the_servers(exposed: bool, host: str) -> None:
    page = {**PLAIN, "Host": host, "Origin": f"http://{host.lower()}"}
    settings = {"public_url": "https://public.example/sd"}
    assert await status("GET", page, **settings) == 200
    assert await status("POST", page | {"Host": host.lower()}, **settings) == 200


@pytest.mark.parametrize(
    "host",
    [
        "xlocalhost.example", "localhost.example", "127.0.0.1.evil.example", "local", "a.xlan.net",
        "[::1].evil.example", "1.evil", "evil.example:localhost", "public.example.evil.example",
    ],
)  # fmt: skip
async def test_names_that_only_look_like_these_are_not(exposed: bool, host: str) -> None:
    page = PLAIN | {"Host": host}
    settings = {"public_url": "https://public.example/sd"}
    assert await status("GET", page, **settings) == (200 if host == "local" else 403)


async def test_programs_and_browsers_behind_a_proxy_may_ask_an_exposed_server_by_any_name(
    exposed: bool,
) -> None:
    other = {"Host": "sd.example.com"}
    expected = 200 if exposed else 403
    for headers in (
        {},
        {"Accept-Language": "*", "Sec-Fetch-Mode": "cors", "Accept-Encoding": "br, gzip"},  # Node
        {"Accept-Language": "en", "Accept-Encoding": "gzip, deflate, br"},  # an application
        TLS,
        TLS | {"Origin": "https://sd.example.com"},
    ):
        for method in ("GET", "POST"):
            assert await status(method, other | headers) == expected
    foreign = TLS | {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert await status("POST", other | foreign) == 403


async def test_probes_may_ask_by_any_name(exposed: bool) -> None:
    for path in ("/livez", "/readyz", "/ping"):
        assert await status("GET", PLAIN | EVIL, path) == 200


async def test_hosts_that_the_operator_names_are_the_only_further_ones(exposed: bool) -> None:
    for settings in ({}, {"api_key": KEY}):
        named = {"allowed_hosts": "sd.example.com,*.b.example", **settings}
        for host, expected in [
            ("SD.example.com:80", 200), ("x.b.example", 200), ("a.x.b.example", 200),
            ("localhost", 200), ("b.example", 403), ("xb.example", 403), ("x.example.com", 403),
        ]:  # fmt: skip
            assert await status("GET", {"Host": host} | BEARER, **named) == expected


@pytest.mark.parametrize(
    "settings", [{"allowed_hosts": "*"}, {"cors_origins": "*"}, {"api_key": KEY}]
)
async def test_all_names_are_allowed_by_a_setting_or_with_a_key(
    exposed: bool, settings: dict[str, Any]
) -> None:
    origin = {"Origin": "http://evil.example:3000"}
    assert await status("POST", PLAIN | EVIL | origin | BEARER, **settings) == 200


async def test_a_server_on_loopback_is_known_by_the_socket_that_it_listens_on() -> None:
    settings = Settings()
    with socket.create_server(("127.0.0.1", 0)) as inside, socket.create_server(("", 0)) as outside:
        for listening, refuses in ((inside, True), (outside, False)):
            headers = [(b"host", b"sd.example.com")]
            scope = {"type": "http", "headers": headers, "server": listening.getsockname()}
            checking = hosts.Hosts(settings)
            if refuses:
                with pytest.raises(Forbidden):
                    await checking.check(scope)
            else:
                await checking.check(scope)


@pytest.mark.parametrize("server", [None, ("/run/sdbento.sock", None)])
async def test_a_server_on_a_unix_socket_is_for_proxies(server: tuple[str, None] | None) -> None:
    scope: dict[str, Any] = {"type": "http", "server": server}
    await hosts.Hosts(Settings()).check(scope | {"headers": [(b"host", b"sd.example.com")]})
    page = [(b"host", b"evil.example"), (b"origin", b"http://evil.example")]
    with pytest.raises(Forbidden):
        await hosts.Hosts(Settings()).check(scope | {"headers": page})


# Any name that somebody can register, and any text

LABEL = st.from_regex(r"[a-z0-9_]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
# What a browser takes for a name: its last label is no number.
TOP = st.sampled_from(["com", "example", "xn--p1ai", "localhost1", "lan-", "0x7f.com", "locals"])
DOMAINS = st.builds("{}.{}".format, st.lists(LABEL, min_size=1, max_size=4).map(".".join), TOP)
LIKE_OURS = st.sampled_from(["localhost", "127.0.0.1", "box.lan", "[::1]", "public.example"])
PORT = st.just("") | st.integers(0, 65535).map(":{}".format)


def is_refused(host: str, exposed: bool) -> bool:
    headers = {**PLAIN, "Host": host}
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "headers": raw, "server": ("127.0.0.1", 3000)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "is_exposed", lambda port: exposed)
        checking = hosts.Hosts(Settings(public_url="https://public.example"))
        try:
            asyncio.run(checking.check(scope))
        except Forbidden:
            return True
    return False


@given(DOMAINS, st.none() | LIKE_OURS, st.sampled_from(["", "."]), PORT, st.booleans())
def test_no_domain_of_the_internet_is_the_servers(
    domain: str, below: str | None, dot: str, port: str, exposed: bool
) -> None:
    host = (domain if below is None else f"{below}.{domain}") + dot + port
    assert is_refused(host, exposed) and is_refused(host.upper(), exposed)


@given(st.text(st.characters(max_codepoint=255), max_size=30), st.booleans())
def test_any_host_is_judged(host: str, exposed: bool) -> None:
    assert is_refused(host, exposed) in (True, False)


@pytest.mark.parametrize("names", ["http://a.example", "a.example:80", "a.*.example", "a b", "a/b"])
def test_what_is_no_name_is_refused(names: str) -> None:
    with pytest.raises(ValueError, match="must be names"):
        Settings.model_validate({"allowed_hosts": names})
