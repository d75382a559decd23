"""Server-sent events: what happens to a request as text, and errors once the stream has begun."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from types import MappingProxyType
from typing import Any, ParamSpec

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sdbento.doors.http import failures
from sdbento.request.events import Event, messages

KEEP_ALIVE = 15.0  # seconds without an event after which a comment keeps proxies from hanging up

P = ParamSpec("P")
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class EventStream(StreamingResponse):
    """Closes its source when the client is gone, at whatever point that is noticed."""

    media_type = "text/event-stream"

    def __init__(
        self, texts: AsyncGenerator[str, None], headers: Mapping[str, str] = NO_HEADERS
    ) -> None:
        super().__init__(texts, headers={**headers, "Cache-Control": "no-cache"})
        self._texts = texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._texts):
            await super().__call__(scope, receive, send)


def guarded_stream(
    handler: Callable[P, AsyncGenerator[str, None]],
) -> Callable[P, AsyncGenerator[str, None]]:
    """As `failures.guarded`, for a handler that yields server-sent events.

    What it raises before the first event decides the answer's status. Later the status has been
    sent, and the error becomes an `error` event.
    """

    @functools.wraps(handler)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[str, None]:
        started = False
        try:
            async with aclosing(handler(*args, **kwargs)) as events:
                async for event in events:
                    started = True
                    yield event
        except Exception as exc:
            error = failures.note(exc)
            if started:
                yield as_text("error", {"event": "error", **error.to_body()})

    return wrapper


def server_sent_events(events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
    """The messages of each event as text; a comment after every KEEP_ALIVE seconds of silence."""
    return kept_alive(_texts(events))


async def _texts(events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        async for event in events:
            for message in messages(event):
                yield as_text(message["event"], message)


async def kept_alive(texts: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """`texts`, and a comment after every KEEP_ALIVE seconds of silence."""
    async with aclosing(texts):
        while True:
            upcoming = asyncio.ensure_future(anext(texts, None))
            try:
                while not (await asyncio.wait({upcoming}, timeout=KEEP_ALIVE))[0]:
                    yield ": keep-alive\n\n"
                text = upcoming.result()
            finally:
                await _cancel(upcoming)
            if text is None:
                return
            yield text


def as_text(event: str, data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel `task` unless it is done, and wait until it has stopped."""
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
