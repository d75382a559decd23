"""Server-sent events: what happens to a request as text, and errors once the stream has begun."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any, ParamSpec

from sdbento.doors.http import failures
from sdbento.request.events import Event, messages

KEEP_ALIVE = 15.0  # seconds without an event after which a comment keeps proxies from hanging up

P = ParamSpec("P")


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
                yield _text({"event": "error", **error.to_body()})

    return wrapper


async def server_sent_events(
    events: AsyncGenerator[Event, None],
) -> AsyncGenerator[str, None]:
    """The messages of each event as text; a comment after every KEEP_ALIVE seconds of silence."""
    async with aclosing(events):
        while True:
            upcoming = asyncio.ensure_future(anext(events, None))
            try:
                while not (await asyncio.wait({upcoming}, timeout=KEEP_ALIVE))[0]:
                    yield ": keep-alive\n\n"
                event = upcoming.result()
            finally:
                await _cancel(upcoming)
            if event is None:
                return
            for message in messages(event):
                yield _text(message)


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel `task` unless it is done, and wait until it has stopped."""
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _text(message: dict[str, Any]) -> str:
    return f"event: {message['event']}\ndata: {json.dumps(message)}\n\n"
