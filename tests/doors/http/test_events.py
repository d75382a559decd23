"""Server-sent events: their text, their silence, and errors before and after the first one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest
from PIL import Image

from sdbento.doors.http import events, failures
from sdbento.doors.http.events import guarded_stream, server_sent_events
from sdbento.engine.handle import Stepped
from sdbento.errors import InvalidParameter
from sdbento.request.events import Done, Event, Queued
from sdbento.request.schema import GenerateRequest
from tests.support.job_server import response_to


async def test_an_event_is_named_and_its_models_are_json() -> None:
    async def given() -> AsyncGenerator[Event, None]:
        yield Done(response_to(GenerateRequest(prompt="a cat", seed=3)))

    [text] = [text async for text in server_sent_events(given())]
    assert text.startswith("event: done\ndata: {")
    message = json.loads(text.removeprefix("event: done\ndata: "))
    assert message["response"]["seeds"] == [3]
    assert message["response"]["timings"]["denoising"] == 0.0


async def test_a_step_with_a_preview_is_two_messages() -> None:
    async def given() -> AsyncGenerator[Event, None]:
        yield Stepped(0, 1, 2, eta=0.12345, preview=Image.new("RGB", (8, 8), "red"))

    step, preview = [text async for text in server_sent_events(given())]
    place = '"image": 0, "step": 1, "num_steps": 2'
    assert step == f'event: step\ndata: {{"event": "step", {place}, "eta": 0.123}}\n\n'
    assert preview.startswith(f'event: preview\ndata: {{"event": "preview", {place}, "preview": "')


async def test_silence_is_broken_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE", 0.01)
    go_on = asyncio.Event()

    async def given() -> AsyncGenerator[Event, None]:
        await go_on.wait()
        yield Queued(2)

    stream = server_sent_events(given())
    assert await anext(stream) == ": keep-alive\n\n"
    assert await anext(stream) == ": keep-alive\n\n"
    go_on.set()
    assert [text async for text in stream if text[0] != ":"] == [
        'event: queued\ndata: {"event": "queued", "position": 2, "eta": null}\n\n'
    ]


async def test_a_stream_that_is_closed_while_it_waits_stops_its_source() -> None:
    stopped = asyncio.Event()

    async def given() -> AsyncGenerator[Event, None]:
        try:
            await asyncio.sleep(60)
            yield Queued(0)
        finally:
            stopped.set()

    stream = server_sent_events(given())
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert stopped.is_set()


@guarded_stream
async def failing_after(num_events: int) -> AsyncGenerator[str, None]:
    for _ in range(num_events):
        yield "an event"
    raise InvalidParameter("width is bad", param="width")


async def test_an_error_before_the_first_event_is_left_to_the_status() -> None:
    failure = failures.watch()
    assert [text async for text in failing_after(0)] == []
    assert failure.error is not None
    assert failure.error.param == "width"


async def test_an_error_after_the_first_event_is_an_event() -> None:
    failures.watch()
    first, error = [text async for text in failing_after(1)]
    assert first == "an event"
    assert error.startswith("event: error\ndata: ")
    assert '"message": "width is bad"' in error
