"""GET /batch: the running batch as server-sent events, for as long as the client listens."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from sdbento.access.addresses import client_address
from sdbento.access.caller import current_caller
from sdbento.doors.http.events import EventStream, kept_alive
from sdbento.doors.http.routing import TheApp, door
from sdbento.live.batch import Batch

router = door("Batch")

LONGEST = 600.0  # seconds of a stream: whoever goes on watching shows again that his key is valid


_JSON = TypeAdapter(Batch)
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events named `batch`; the data of each is such an object",
        "content": {"text/event-stream": {"schema": _JSON.json_schema(mode="serialization")}},
    }
}


@router.get("/batch", response_class=Response, responses=_EVENTS)
async def watch_batch(request: Request, app: TheApp) -> EventStream:
    """What runs at the moment, as server-sent events: who is in the batch, and who waits.

    An event comes after UNet calls and when a request comes or goes, ten times a second at most,
    and once a second in any case. A client that reads slowly misses some. Of the requests of
    others, neither prompts nor LoRAs nor owners are told. The stream ends after ten minutes; ask
    again to go on.
    """
    batches = app.watch(has_own=not is_through_proxy(request))
    first = await anext(batches)  # raises what refuses the request
    return EventStream(kept_alive(_texts(first, batches)))


def is_through_proxy(request: Request) -> bool:
    """Whether a proxy that is not trusted passes the request on: all its clients have its address,
    and must not see each other's prompts."""
    caller, peer = current_caller(), request.client.host if request.client else None
    is_forwarded = "x-forwarded-for" in request.headers or "forwarded" in request.headers
    return is_forwarded and caller.name is None and caller.address == client_address(peer, (), ())


async def _texts(first: Batch, batches: AsyncGenerator[Batch, None]) -> AsyncGenerator[str, None]:
    began = time.monotonic()
    async with aclosing(batches):
        yield _text(first)
        async for batch in batches:
            yield _text(batch)
            if time.monotonic() - began > LONGEST:
                return


def _text(batch: Batch) -> str:
    return f"event: {batch.event}\ndata: {_JSON.dump_json(batch).decode()}\n\n"
