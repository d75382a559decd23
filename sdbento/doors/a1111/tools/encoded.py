"""Images as these routes take them, work on them and answer them: base64, maybe in a data URI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from sdbento.access.caller import current_caller
from sdbento.background import ThreadPool
from sdbento.outbound import is_url

if TYPE_CHECKING:
    from sdbento.app import App

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 2  # few, because each may hold an image of the largest size


class ImageThreads(ThreadPool):
    """Threads for work on images. A key has one of them at a time, so that whoever sends many
    images keeps others waiting for one at most."""

    def __init__(self, name: str) -> None:
        super().__init__(THREADS, name)
        self._places: WeakValueDictionary[str | None, asyncio.Semaphore] = WeakValueDictionary()

    async def run_for_caller(
        self, app: App, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """As `run`, and as a request of the present caller, who may have too many. Raises
        Overloaded and LimitReached.

        If this is cancelled, the caller's next call still waits until the thread is free.
        """
        name = current_caller().name
        size = THREADS if name is None else 1
        place = self._places.setdefault(name, asyncio.Semaphore(size))

        def leave(work: asyncio.Future[T]) -> None:
            place.release()
            if not work.cancelled():
                work.exception()  # is told to nobody if the client has left

        with app.counted():
            await place.acquire()
            work = asyncio.ensure_future(self.run(function, *args, **kwargs))
            work.add_done_callback(leave)
            return await asyncio.shield(work)


threads = ImageThreads("sdbento-images")


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
