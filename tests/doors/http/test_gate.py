"""Keys as clients meet them: the Guard before a small application, without a network."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from sdbento.access import entries, keyring
from sdbento.access.caller import current_caller
from sdbento.doors.error_shape import ErrorShape
from sdbento.doors.http.guard import Guard
from sdbento.settings import Settings

KEY = "the-key"
BEARER = {"Authorization": f"Bearer {KEY}"}


async def who(request: Request) -> PlainTextResponse:
    await request.body()
    return PlainTextResponse(str(current_caller().name))


paths = ["/livez", "/readyz", "/ping", "/metrics", "/", "/files/{name}", "/generate", "/v1/images"]
routes = Router([Route(path, who, methods=["GET", "POST"]) for path in paths])


@asynccontextmanager
async def client(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    shape = ErrorShape(body=lambda error: {"said": error.message}, status=lambda _: 418)
    loaded = Settings.model_validate(settings)
    guard = Guard(routes, lambda: loaded, {}, {"/v1/": shape}, open_prefixes=("/files/",))
    transport = httpx.ASGITransport(guard)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + b64encode(f"{user}:{password}".encode()).decode()}


@pytest.mark.parametrize(
    "headers",
    [
        BEARER,
        basic("", KEY),
        basic("anybody", KEY),
        basic(KEY, ""),
        {"Authorization": KEY},
        {"X-API-Key": KEY},
    ],
)
async def test_a_key_is_accepted_in_any_way_that_clients_send_it(headers: dict[str, str]) -> None:
    async with client(api_key=KEY) as ask:
        answer = await ask.post("/generate", headers=headers)
        assert (answer.status_code, answer.text) == (200, "default")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic "},
        {"Authorization": "Basic !!!"},
        basic(KEY, "wrong"),
        {"Cookie": f"key={KEY}"},
    ],
)
async def test_without_it_there_is_one_answer_that_tells_nothing(headers: dict[str, str]) -> None:
    async with client(api_key=KEY) as ask:
        for path in ("/generate", "/metrics", "/nothing", f"/generate?api_key={KEY}"):
            answer = await ask.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers.get_list("www-authenticate") == [
                'Bearer realm="sdbento"',
                'Basic realm="sdbento", charset="UTF-8"',
            ]
            assert answer.json()["error"]["type"] == "unauthorized"
            assert KEY not in answer.text


async def test_a_door_says_it_in_its_own_shape() -> None:
    async with client(api_key=KEY) as ask:
        answer = await ask.get("/v1/images")
        assert answer.status_code == 418
        assert "key is needed" in answer.json()["said"]


async def test_health_and_the_page_are_open_and_nothing_that_looks_like_it() -> None:
    async with client(api_key=KEY) as ask:
        for path in ("/", "/livez", "/readyz", "/ping", "/files/abc.png"):
            for method in ("GET", "HEAD"):
                answer = await ask.request(method, path)
                assert answer.status_code == 200
            assert (await ask.post(path)).status_code == 401
        for path in (
            "http://server//generate", "/livez/../generate", "/livez/%2e%2e/generate", "/LIVEZ",
            "/livez%00", "/livez%20", "/ping/x", "/files/", "/files/../generate", "/files/a/b",
            "/files", "/xfiles/a",
        ):  # fmt: skip
            answer = await ask.get(path)
            assert answer.status_code in (401, 404), path
            assert answer.text != "None"


async def test_metrics_are_open_by_a_setting() -> None:
    async with client(api_key=KEY, metrics_public=True) as ask:
        assert (await ask.get("/metrics")).status_code == 200
        assert (await ask.post("/metrics")).status_code == 401


@pytest.mark.parametrize(
    "value", [None, b"", b"Basic ", b"Basic Og==", b"Bearer x", b"\xff\xfe\x01", b"Bearer " * 900]
)
async def test_without_keys_everything_passes(value: bytes | None) -> None:
    headers = [] if value is None else [(b"authorization", value)]
    async with client() as ask:
        answer = await ask.post("/generate", headers=headers)
        assert (answer.status_code, answer.text) == (200, "None")


async def test_the_body_of_a_stranger_is_not_read() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        pytest.fail("the body was read")

    async def send(message: Message) -> None:
        sent.append(message)

    guard = Guard(routes, lambda: Settings.model_validate({"api_key": KEY}), {})
    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    await guard(scope, receive, send)
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_a_body_for_what_is_open_to_all_is_not_kept(method: str) -> None:
    bodies: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.append(await Request(scope, receive).body())
        await PlainTextResponse("")(scope, receive, send)

    async def receive() -> Message:
        if unsent:
            return {"type": "http.request", "body": unsent.pop(), "more_body": True}
        return await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    sent: list[Message] = []
    unsent = [b"x"] * 10
    scope = {"type": "http", "method": method, "path": "/ping", "headers": []}
    for settings in (Settings(), Settings.model_validate({"api_key": KEY})):
        await Guard(app, lambda settings=settings: settings, {})(scope, receive, send)  # type: ignore[misc]
    assert bodies == [b"", b""]
    assert sent[0]["status"] == 200


async def test_websockets_are_closed_with_and_without_a_key() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    for settings in (Settings(), Settings.model_validate({"api_key": KEY})):
        guard = Guard(routes, lambda settings=settings: settings, {})  # type: ignore[misc]
        await guard({"type": "websocket", "path": "/generate", "headers": []}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"] * 2


# Several keys


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(keyring, "CHECK_SECONDS", 0.0)
    return tmp_path / "keys.yaml"


async def test_each_key_has_its_name_and_goes_with_its_entry(file: Path) -> None:
    headers = {
        name: {"Authorization": f"Bearer {entries.add(file, name)}"} for name in ("alice", "bob")
    }
    async with client(api_key=KEY, api_keys=file) as ask:
        for name in ("alice", "bob"):
            assert (await ask.get("/generate", headers=headers[name])).text == name
        assert (await ask.get("/generate", headers=BEARER)).text == "default"
        entries.remove(file, "alice")
        assert (await ask.get("/generate", headers=headers["alice"])).status_code == 401
        assert (await ask.get("/generate", headers=headers["bob"])).text == "bob"


async def test_one_request_too_many_in_a_minute_is_refused_and_harms_no_other(file: Path) -> None:
    alice = {"Authorization": f"Bearer {entries.add(file, 'alice', requests_per_minute=3)}"}
    bob = {"Authorization": f"Bearer {entries.add(file, 'bob', requests_per_minute=3)}"}
    async with client(api_keys=file) as ask:
        answers = [await ask.get("/generate", headers=alice) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        assert answers[-1].json()["error"]["type"] == "limit_reached"
        assert (await ask.get("/generate", headers=bob)).status_code == 200
        assert (await ask.get("/livez", headers=alice)).status_code == 200


# Browsers


PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


async def test_pages_of_named_origins_may_ask() -> None:
    async with client(api_key=KEY, cors_origins="https://page.example, http://b.example/") as ask:
        answer = await ask.options("/generate", headers=PREFLIGHT)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
        for path, headers in (("/generate", BEARER), ("/generate", {}), ("/nothing", BEARER)):
            answer = await ask.get(path, headers={"Origin": "http://b.example"} | headers)
            assert answer.headers["access-control-allow-origin"] == "http://b.example"
            assert answer.headers["access-control-allow-credentials"] == "true"
            assert answer.headers["vary"] == "Origin"
        for origin in ("https://evil.example", "null", "https://page.example.evil"):
            answer = await ask.get("/generate", headers={"Origin": origin} | BEARER)
            assert "access-control-allow-origin" not in answer.headers


async def test_all_pages_may_ask_but_not_with_what_the_browser_remembers() -> None:
    async with client(api_key=KEY, cors_origins="*") as ask:
        answer = await ask.options("/generate", headers=PREFLIGHT)
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


async def test_without_origins_there_are_no_such_headers_and_options_still_answer() -> None:
    async with client(api_key=KEY) as ask:
        answer = await ask.options("/generate", headers=PREFLIGHT)
        assert answer.status_code == 204
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert {"GET", "POST", "OPTIONS"} <= set(answer.headers["allow"].split(", "))
        assert (await ask.options("/nothing")).status_code == 404
        assert (await ask.options("/v1/images")).status_code == 204


PAGE = "https://page.example"


@pytest.mark.parametrize(
    ("origin", "site"),
    [
        ("https://evil.example", "cross-site"),
        ("https://evil.example", None),  # an old browser, or no TLS
        ("http://evil.server", "same-site"),
        ("http://server:8080", None),
        ("null", "cross-site"),  # a frame in a sandbox
        ("null", None),
        (None, "cross-site"),
    ],
)
async def test_a_page_of_another_host_can_send_nothing_with_what_the_browser_remembers(
    origin: str | None, site: str | None
) -> None:
    page = {"Origin": origin, "Sec-Fetch-Site": site, "Content-Type": "text/plain"}
    headers = {name: value for name, value in page.items() if value is not None}
    for origins in ("", PAGE):
        async with client(cors_origins=origins) as ask:
            answer = await ask.post("/generate", headers=headers, content=b"{}")
            assert (answer.status_code, answer.json()["error"]["type"]) == (403, "forbidden")
            assert "SDBENTO_CORS_ORIGINS" in answer.json()["error"]["message"]
            assert (await ask.post("/v1/images", headers=headers)).status_code == 418
            assert (await ask.get("/generate", headers=headers)).status_code == 200
    for origins in ("", PAGE, "*"):
        async with client(api_key=KEY, cors_origins=origins) as ask:
            answer = await ask.post("/generate", headers=headers | basic("", KEY))
            assert answer.status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://server", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://server"},
        {"Origin": "https://server"},  # a proxy speaks TLS
        {"Origin": "https://proxy.example", "Sec-Fetch-Site": "same-origin"},  # and changes Host
        {"Sec-Fetch-Site": "none"},  # typed by the user, or an extension of the browser
        {"Sec-Fetch-Mode": "cors"},  # fetch of Node
        {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"},
    ],
)
async def test_pages_of_the_server_and_of_named_origins_may_send(headers: dict[str, str]) -> None:
    async with client(api_key=KEY, cors_origins=PAGE) as ask:
        answer = await ask.post("/generate", headers=headers | basic("", KEY))
        assert (answer.status_code, answer.text) == (200, "default")


@pytest.mark.parametrize("key", [BEARER, {"X-API-Key": KEY}])
async def test_a_key_that_no_browser_sends_by_itself_is_enough(key: dict[str, str]) -> None:
    """Applications made of web pages (Electron) need not ask by CORS."""
    app = {"Origin": "app://local", "Sec-Fetch-Site": "cross-site"}
    async with client(api_key=KEY) as ask:
        assert (await ask.post("/generate", headers=app | key)).text == "default"


async def test_all_pages_may_send_where_all_are_named() -> None:
    async with client(cors_origins="*") as ask:
        answer = await ask.post("/generate", headers={"Origin": "https://any.example"})
        assert answer.status_code == 200


@pytest.mark.parametrize("origins", ["example.com", "https://a.example/path", "https://*.example"])
def test_what_is_no_origin_is_refused(origins: str) -> None:
    with pytest.raises(ValueError, match="must be origins"):
        Settings.model_validate({"cors_origins": origins})
