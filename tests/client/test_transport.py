"""Calls on the wire, with answers that a test gives; blocking and async alike."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest

from sdbento import __version__
from sdbento.client import AsyncClient, Client, retries
from sdbento.client.errors import NoAnswer, NotConnected, NotUnderstood
from sdbento.errors import InvalidParameter, OutOfMemory, Overloaded, SDBentoError, Unavailable
from sdbento.request.schema import GenerateResponse, Timings

DONE = GenerateResponse(
    images=["AAAA"],
    seeds=[7],
    infotexts=["x"],
    model="shapes",
    parameters={},
    timings=Timings(queued=0, denoising=0, decoding=0, total=0),
).model_dump(mode="json")
BUSY = Overloaded("the queue is full").to_body()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.0)


class Wire:
    """Answers with `answers` in turn, an exception by raising it; keeps the requests."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.requests: list[httpx.Request] = []
        self._answers = list(answers)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self)


Ask = Callable[..., Any]


def ask_blocking(wire: Wire, method: str, *args: Any, options: Any, **fields: Any) -> Any:
    with Client(transport=wire.transport, **options) as client:
        return getattr(client, method)(*args, **fields)


def ask_async(wire: Wire, method: str, *args: Any, options: Any, **fields: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(transport=wire.transport, **options) as client:
            return await getattr(client, method)(*args, **fields)

    return asyncio.run(ask())


@pytest.fixture(params=[ask_blocking, ask_async], ids=["blocking", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    def asked(wire: Wire, method: str, *args: Any, options: Any = None, **fields: Any) -> Any:
        return request.param(wire, method, *args, options=options or {}, **fields)

    return asked


def test_a_request_is_json_with_a_key(ask: Ask) -> None:
    wire = Wire(httpx.Response(200, json=DONE))
    options = {"base_url": "https://example.com/images/", "api_key": "k"}
    made = ask(wire, "generate", "a cat", options=options, seed=7)
    [request] = wire.requests
    assert (request.method, str(request.url)) == ("POST", "https://example.com/images/generate")
    assert json.loads(request.content) == {"prompt": "a cat", "seed": 7}
    assert request.headers["authorization"] == "Bearer k"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["user-agent"] == f"sdbento-client/{__version__}"
    assert made.seeds == [7]


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_none_is_sent(ask: Ask, key: str | None) -> None:
    wire = Wire(httpx.Response(200, json=DONE))
    ask(wire, "generate", "a cat", options={"api_key": key})
    assert "authorization" not in wire.requests[0].headers


def test_an_edit_is_a_request_with_images(ask: Ask) -> None:
    wire = Wire(httpx.Response(200, json=DONE))
    ask(wire, "edit", b"\0\0\0", "a cat", b"\0\0\1", strength=0.5)
    sent = json.loads(wire.requests[0].content)
    assert sent == {"prompt": "a cat", "image": "AAAA", "mask_image": "AAAB", "strength": 0.5}


def test_a_misspelt_field_is_not_sent(ask: Ask) -> None:
    wire = Wire()
    with pytest.raises(InvalidParameter, match="it is called num_inference_steps here"):
        ask(wire, "generate", "a cat", steps=5)
    assert wire.requests == []


def test_a_refused_call_is_sent_again(ask: Ask) -> None:
    wire = Wire(
        httpx.ConnectError("refused"),
        httpx.Response(429, json=BUSY, headers={"Retry-After": "0"}),
        httpx.Response(200, json=DONE),
    )
    assert ask(wire, "generate", "a cat").seeds == [7]
    assert len({request.content for request in wire.requests}) == 1 < len(wire.requests)


def test_what_is_refused_too_often_is_raised(ask: Ask) -> None:
    answers = [httpx.Response(429, json=BUSY, headers={"Retry-After": "0"}) for _ in range(3)]
    wire = Wire(*answers)
    with pytest.raises(Overloaded, match="the queue is full") as refused:
        ask(wire, "generate", "a cat")
    assert (refused.value.status, refused.value.retry_after) == (429, 0.0)
    assert len(wire.requests) == 3


def test_the_longest_pauses_are_left_to_the_caller(ask: Ask) -> None:
    wire = Wire(httpx.Response(429, json=BUSY, headers={"Retry-After": "3600"}))
    with pytest.raises(Overloaded) as refused:
        ask(wire, "generate", "a cat")
    assert refused.value.retry_after == 3600.0


BROKEN = [httpx.ReadError("reset"), httpx.RemoteProtocolError("cut"), httpx.ReadTimeout("late")]


@pytest.mark.parametrize("error", BROKEN, ids=lambda e: type(e).__name__)
def test_work_that_may_have_begun_is_not_sent_again(ask: Ask, error: Exception) -> None:
    wire = Wire(error)
    with pytest.raises(NoAnswer) as broken:
        ask(wire, "generate", "a cat")
    assert not isinstance(broken.value, NotConnected)
    listing = Wire(error, httpx.Response(200, json={"models": []}))
    assert ask(listing, "models") == []


def test_a_lack_of_memory_is_not_tried_again(ask: Ask) -> None:
    wire = Wire(httpx.Response(503, json=OutOfMemory("too small").to_body()))
    with pytest.raises(OutOfMemory):
        ask(wire, "generate", "a cat")


def test_a_server_that_is_not_ours_is_named_as_such(ask: Ask) -> None:
    for body in ("<html>hello</html>", "{}", "[]", '{"images": 5}'):
        with pytest.raises(NotUnderstood, match="/generate answered something unknown") as told:
            ask(Wire(httpx.Response(200, text=body)), "generate", "a cat")
        assert told.value.status == 200
        with pytest.raises(NotUnderstood, match="/models"):
            ask(Wire(httpx.Response(200, text=body)), "models")


def test_ready_means_that_requests_can_be_sent(ask: Ask) -> None:
    assert ask(Wire(httpx.Response(200)), "ready") is True
    assert ask(Wire(httpx.Response(503, json=Unavailable("loading").to_body())), "ready") is False
    assert ask(Wire(httpx.ConnectError("refused")), "ready") is False
    with pytest.raises(SDBentoError, match="HTTP 404"):
        ask(Wire(httpx.Response(404)), "ready")


def test_an_answer_may_take_as_long_as_the_request_allows(ask: Ask) -> None:
    def read_timeout(options: Any, **fields: Any) -> float | None:
        wire = Wire(httpx.Response(200, json=DONE))
        ask(wire, "generate", "a cat", options=options, **fields)
        seconds: float | None = wire.requests[0].extensions["timeout"]["read"]
        return seconds

    assert read_timeout({"timeout": 50}) == 50
    assert read_timeout({"timeout": 50}, timeout=100.0) == 130
    assert read_timeout({"timeout": 500}, timeout=100.0) == 500
    assert read_timeout({"timeout": None}) is None


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_bad_options_are_refused(client: Callable[..., object]) -> None:
    for base_url in (
        "localhost:3000",
        "",
        "ftp://a.example",
        "//a.example",
        "http://",
        "http://a:b",
    ):
        with pytest.raises(ValueError, match="base_url"):
            client(base_url)
    for key in ("a\nb", "schlüssel", "a\0"):
        with pytest.raises(ValueError, match="api_key must be printable") as refused:
            client(api_key=key)
        assert key not in str(refused.value)
    with pytest.raises(ValueError, match="max_retries"):
        client(max_retries=-1)


# Streams


def events(*messages: dict[str, Any]) -> httpx.Response:
    lines = [f"event: {message['event']}\ndata: {json.dumps(message)}\n\n" for message in messages]
    return httpx.Response(200, text="".join([": keep-alive\n\n", *lines]))


QUEUED = {"event": "queued", "position": 0, "eta": None}
STEP = {"event": "step", "image": 0, "step": 1, "num_steps": 4, "eta": 1.0}
END = {"event": "done", "response": DONE}


def read_blocking(wire: Wire) -> Iterator[tuple[object, float]]:
    with Client(transport=wire.transport) as client, client.stream("a cat") as stream:
        for event in stream:
            yield type(event).__name__, stream.progress


def read_async(wire: Wire) -> Iterator[tuple[object, float]]:
    async def read() -> list[tuple[object, float]]:
        async with AsyncClient(transport=wire.transport) as client:
            async with client.stream("a cat") as stream:
                return [(type(event).__name__, stream.progress) async for event in stream]

    yield from asyncio.run(read())


@pytest.fixture(params=[read_blocking, read_async], ids=["blocking", "async"])
def read(request: pytest.FixtureRequest) -> Callable[[Wire], Iterator[tuple[object, float]]]:
    reader: Callable[[Wire], Iterator[tuple[object, float]]] = request.param
    return reader


Read = Callable[[Wire], Iterator[tuple[object, float]]]


def test_a_stream_tells_of_its_progress(read: Read) -> None:
    seen = list(read(Wire(events(QUEUED, STEP, {"event": "applause"}, END))))
    assert seen == [("Queued", 0.0), ("Step", 0.25), ("Done", 1.0)]


def test_a_refused_stream_is_sent_again(read: Read) -> None:
    wire = Wire(httpx.Response(429, json=BUSY, headers={"Retry-After": "0"}), events(END))
    assert [name for name, _ in read(wire)] == ["Done"]


def test_a_refused_stream_raises_the_error(read: Read) -> None:
    error = InvalidParameter("no such sampler", param="scheduler")
    with pytest.raises(InvalidParameter, match="no such sampler"):
        list(read(Wire(httpx.Response(422, json=error.to_body()))))


class Broken(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body whose connection breaks."""

    def __iter__(self) -> Iterator[bytes]:
        yield b": keep-alive\n\n"
        raise httpx.ReadError("reset")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b": keep-alive\n\n"
        raise httpx.ReadError("reset")


@pytest.mark.parametrize("status", [200, 429, 500])
def test_a_stream_whose_connection_breaks_is_an_error(read: Read, status: int) -> None:
    wire = Wire(httpx.Response(status, stream=Broken()))
    with pytest.raises(NoAnswer, match="reset"):
        list(read(wire))
    assert len(wire.requests) == 1


def test_an_error_in_a_stream_is_raised(read: Read) -> None:
    failed = {"event": "error", **OutOfMemory("too small").to_body()}
    wire = Wire(events(STEP, failed))
    with pytest.raises(OutOfMemory):
        list(read(wire))
    assert len(wire.requests) == 1


def test_a_stream_that_is_cut_off_is_an_error(read: Read) -> None:
    for answer in (events(STEP), events(), httpx.Response(200, text="<html></html>")):
        with pytest.raises(NoAnswer, match="ended before its images"):
            list(read(Wire(answer)))


def test_result_waits_for_the_images() -> None:
    with Client(transport=Wire(events(STEP, END)).transport) as client:
        stream = client.stream("a cat")
        assert stream.result().seeds == [7]
        assert stream.result().seeds == [7]  # also when it is over
        assert list(stream) == []


async def test_images_of_a_stream_are_not_encoded_on_the_event_loop() -> None:
    class File(BytesIO):
        def read(self, *_: object) -> bytes:
            threads.append(threading.current_thread())
            return b"an image"

    threads: list[threading.Thread] = []
    async with AsyncClient(transport=Wire(events(END)).transport) as client:
        await client.stream("a cat", image=File()).result()
    assert threads and threading.current_thread() not in threads


async def test_what_is_wrong_with_a_streams_fields_is_raised_by_its_first_event() -> None:
    async with AsyncClient(transport=Wire().transport) as client:
        for image, error in ((Path("no-such-file.png"), OSError), (7, TypeError)):
            with pytest.raises(error):
                await client.stream("a cat", image=image).result()  # type: ignore[arg-type]


async def test_result_can_be_awaited() -> None:
    async with AsyncClient(transport=Wire(events(STEP, END)).transport) as client:
        assert (await client.stream("a cat").result()).seeds == [7]


def test_a_stream_that_is_left_closes_its_connection() -> None:
    answer = events(STEP, END)
    with Client(transport=Wire(answer).transport) as client:
        for _ in client.stream("a cat"):
            break
        assert answer.is_closed
