"""The Guard in front of a small ASGI application: bodies, their parsing, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from sdbento.doors.http.guard import Guard, parsed_request
from sdbento.request.schema import GenerateRequest
from sdbento.settings import Settings, SettingsError

LIMIT = 1024
Handler = Callable[[Request], Awaitable[bytes]]


class Client:
    """Sends one request to a Guard around `handler` and keeps the response."""

    def __init__(self, handler: Handler, takes_body: bool = True) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            body = await handler(Request(scope, receive))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})

        settings = Settings(max_body_bytes=LIMIT)
        self._guard = Guard(
            app,
            lambda: settings,
            {"/generate": GenerateRequest},
            takes_body=lambda _: takes_body,
        )
        self.gone = asyncio.Event()
        self.sent: list[Message] = []

    async def post(
        self,
        path: str,
        *chunks: bytes,
        headers: Mapping[str, str] = MappingProxyType({}),
        leaves_early: bool = False,
    ) -> None:
        unsent = list(chunks)
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(name.encode(), text.encode()) for name, text in headers.items()],
        }

        async def receive() -> Message:
            if unsent:
                more = len(unsent) > 1 or leaves_early
                return {"type": "http.request", "body": unsent.pop(0), "more_body": more}
            if not leaves_early:
                await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.sent.append(message)

        await self._guard(scope, receive, send)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def message(self) -> str:
        return str(json.loads(self.body)["error"]["message"])


async def echo(request: Request) -> bytes:
    return await request.body()


async def unreachable(request: Request) -> bytes:
    pytest.fail("the handler was called")


async def test_a_handler_gets_the_parsed_request_in_place_of_the_body() -> None:
    seen: list[Any] = []

    async def handler(request: Request) -> bytes:
        seen.append(await parsed_request(request))
        seen.append(request.headers["content-type"])
        return await request.body()

    client = Client(handler)
    await client.post("/generate", b'{"prompt": ', b'"x"}', headers={"content-type": "text/plain"})
    assert seen == [GenerateRequest(prompt="x"), "application/json"]
    assert (client.status, client.body) == (200, b"")


@pytest.mark.parametrize(
    ("sent", "seen"), [("/models/", "/models"), ("/", "/"), ("//", "//"), ("/a/b//", "/a/b")]
)
async def test_a_path_may_end_in_a_slash(sent: str, seen: str) -> None:
    async def handler(request: Request) -> bytes:
        return str(request.scope["path"]).encode()

    client = Client(handler)
    await client.post(sent, b"")
    assert client.sent[-1]["body"] == seen.encode()


async def test_nothing_is_kept_of_a_body_that_no_route_reads() -> None:
    async def handler(request: Request) -> bytes:
        held = client._guard._bodies._places.taken.values()
        return b"%d %d" % (len(await request.body()), sum(held))

    for takes_body, seen in ((True, b"1000 1000"), (False, b"0 0")):
        client = Client(handler, takes_body)
        await client.post("/nowhere", b" " * 500, b" " * 500)
        assert client.body == seen


async def test_bodies_of_other_paths_pass_as_they_are() -> None:
    client = Client(echo)
    await client.post("/run", b"any", b"thing")
    assert (client.status, client.body) == (200, b"anything")


@pytest.mark.parametrize(
    ("chunks", "headers"),
    [
        ([b""], {"content-length": str(LIMIT + 1)}),
        ([b"x" * LIMIT, b"x"], {}),
        ([b"x" * LIMIT, b"x"], {"content-length": "12"}),
    ],
    ids=["declared", "sent", "more than declared"],
)
async def test_a_body_over_the_limit_is_refused(
    chunks: list[bytes], headers: dict[str, str]
) -> None:
    for path in ("/run", "/generate"):
        client = Client(unreachable)
        await client.post(path, *chunks, headers=headers)
        assert client.status == 413
        assert f"at most {LIMIT} bytes" in client.message


async def test_a_form_that_is_broken_is_refused() -> None:
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        client = Client(unreachable)
        await client.post("/generate", b"no form", headers={"content-type": kind})
        assert client.status in (400, 422)


async def test_a_client_that_leaves_before_its_body_is_sent_is_not_answered() -> None:
    client = Client(unreachable)
    await client.post("/generate", b'{"prompt"', leaves_early=True)
    assert client.sent == []


async def test_a_client_that_leaves_stops_the_handler(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stopped = asyncio.Event()

    async def handler(request: Request) -> bytes:
        client.gone.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.set()
        return b""

    client = Client(handler)
    await asyncio.wait_for(client.post("/run", b"x"), 10)
    assert stopped.is_set()
    assert client.status == 499
    assert "the client of '/run' went away" in caplog.text


async def test_a_path_cannot_forge_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def handler(request: Request) -> bytes:
        client.gone.set()
        await asyncio.sleep(60)
        return b""

    client = Client(handler)
    await asyncio.wait_for(client.post("/run\nERROR all is lost", b""), 10)
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]


async def test_other_protocols_than_http_pass() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def nothing(*_: Any) -> Any:
        pytest.fail("it was read or answered")

    await Guard(app, Settings, {})({"type": "lifespan"}, nothing, nothing)
    assert seen == ["lifespan"]


async def test_what_follows_the_answer_is_not_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    """Servers tell of a disconnect as soon as the answer is complete, and files are closed later.

    It surfaced as 'Server disconnected without sending a response' of the next request.
    """
    done: list[str] = []
    gone = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 10})
        await asyncio.sleep(0.01)
        done.append("closed")

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            gone.set()

    unread: list[Message] = [{"type": "http.request", "body": b""}]
    sent: list[Message] = []
    guard = Guard(app, Settings, {})
    scope = {"type": "http", "method": "GET", "path": "/file", "headers": []}
    with caplog.at_level(logging.INFO):
        await guard(scope, receive, send)
    assert done == ["closed"] and len(sent) == 2 and "went away" not in caplog.text


async def test_a_bad_setting_does_not_keep_the_service_from_telling_of_it() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def nothing(*_: Any) -> Any:
        pytest.fail("it was read or answered")

    def bad() -> Settings:
        raise SettingsError("PRECISION='fp4': there is no such precision")

    await Guard(app, bad, {})({"type": "lifespan"}, nothing, nothing)
    assert seen == ["lifespan"]


async def test_a_form_without_room_on_the_disk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdbento.doors.http.guard.body_as_json", full)
    client = Client(echo)
    await client.post("/generate", b"{}")
    assert (client.status, client.message) == (503, "the disk is full")
