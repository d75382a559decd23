"""Images as these routes take them, work on them and answer them: base64, maybe in a data URI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from sdbento.access.threads import SharedThreads
from sdbento.outbound.urls import is_url

if TYPE_CHECKING:
    from sdbento.app import App

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 2  # few, because each may hold an image of the largest size
threads = SharedThreads(THREADS, "sdbento-images")


async def work_on_image(
    app: App,
    threads: SharedThreads,
    function: Callable[P, T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """What `function` returns in one of `threads`, as a request of the present caller, who may have
    too many: raises Overloaded and LimitReached."""
    async with app.counted():
        return await threads.run(function, *args, **kwargs)


def _is_no_url(source: str) -> str:
    """A host that answers slowly would keep a thread busy that others wait for."""
    if is_url(source):
        raise PydanticCustomError("url", "should be base64 or a data URI; no URL is fetched here")
    return source


EncodedImage = Annotated[
    str,
    StringConstraints(min_length=1, strip_whitespace=True),
    AfterValidator(_is_no_url),
    Field(description="Base64 or data URI"),
]


async def answer(body: dict[str, Any]) -> Response:
    """`body` as JSON, which takes long where it holds images, and so is not written on the event
    loop."""
    text = await asyncio.to_thread(json.dumps, body)
    return Response(text, media_type="application/json")
