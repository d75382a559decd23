"""Answers as server-sent events: previews on the way, then each image.

Source: the types of openai-python for events, `image_generation.partial_image` and its kin. Partial
images are the engine's previews of the first image, enlarged to the size of the image to come.
"""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from sdbento.doors.http import failures
from sdbento.doors.http.events import EventStream, as_text, kept_alive
from sdbento.doors.openai.answers import headers, size_in_words, usage_of
from sdbento.doors.openai.failures import to_body
from sdbento.doors.openai.order import Order
from sdbento.engine.handle import Stepped
from sdbento.images import codec
from sdbento.request.events import Done, Event, Queued

if TYPE_CHECKING:
    from sdbento.app import App

Kind = Literal["image_generation", "image_edit"]


async def stream(app: App, order: Order, kind: Kind) -> EventStream:
    """Raises what refuses the request; later errors become an event."""
    if order.body.partial_images and not order.request.preview_every:
        order = order.with_fields(preview_every=preview_every(order))
    events = app.stream(order.request)
    first = await anext(events)
    assert isinstance(first, Queued) and first.size is not None
    texts = _texts(events, order, kind, first.size)
    return EventStream(kept_alive(texts), headers(order, first.warnings))


def preview_every(order: Order) -> int:
    """So many steps that the partial images are spread over all of them."""
    request = order.request
    steps = request.num_inference_steps or order.spec.num_inference_steps
    return max(1, int(steps * (request.strength or 1.0)) // (order.body.partial_images + 1))


async def _texts(
    events: AsyncGenerator[Event, None], order: Order, kind: Kind, size: tuple[int, int]
) -> AsyncGenerator[str, None]:
    shown = 0
    try:
        async with aclosing(events):
            async for event in events:
                match event:
                    case Stepped(image=0, preview=Image.Image() as preview) if (
                        shown < order.body.partial_images and event.step < event.num_steps
                    ):
                        yield await asyncio.to_thread(_partial, order, kind, preview, size, shown)
                        shown += 1
                    case Done(response):
                        for image in response.images:
                            yield await asyncio.to_thread(_completed, order, kind, image, size)
    except Exception as exc:
        error = failures.note(exc)
        yield as_text("error", {"type": "error", **to_body(error)})


def _partial(
    order: Order, kind: Kind, preview: Image.Image, size: tuple[int, int], index: int
) -> str:
    request = order.request
    enlarged = preview.resize(size, Image.Resampling.BICUBIC)
    data = codec.encode(enlarged, request.output_format, quality=request.output_compression)
    image = b64encode(data).decode("ascii")
    return _event(f"{kind}.partial_image", order, image, size, partial_image_index=index)


def _completed(order: Order, kind: Kind, image: str, size: tuple[int, int]) -> str:
    usage = usage_of(order.request.prompt).model_dump()
    return _event(f"{kind}.completed", order, image, size, usage=usage)


def _event(name: str, order: Order, image: str, size: tuple[int, int], **more: Any) -> str:
    message = {
        "type": name,
        "b64_json": image,
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": order.request.output_format,
        "quality": order.quality,
        "size": size_in_words(size),
        **more,
    }
    return as_text(name, message)
