"""What happens to a request while it runs and at its end, as types and as JSON messages."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sdbento.engine.handle import Stepped
from sdbento.images import codec
from sdbento.request.schema import GenerateResponse


@dataclass(frozen=True)
class Queued:
    """The request waits beside `position` others that are not finished.

    `eta`: seconds until it is done; None while its models may have to be loaded. Only the first of
    these events has `size`, width and height of the images to come, and `warnings`, those of Done
    that are known by then.
    """

    position: int
    eta: float | None = None
    size: tuple[int, int] | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """All images are there."""

    response: GenerateResponse


Event = Queued | Stepped | Done


def messages(event: Event) -> Iterator[dict[str, Any]]:
    """The event as JSON objects, each named by its "event"; a step with a preview is two."""
    match event:
        case Queued(position, eta):
            rounded = None if eta is None else round(eta, 3)
            yield {"event": "queued", "position": position, "eta": rounded}
        case Stepped(image, step, num_steps, eta, preview):
            place = {"image": image, "step": step, "num_steps": num_steps}
            yield {"event": "step", **place, "eta": round(eta, 3)}
            if preview is not None:
                encoded = b64encode(codec.encode(preview, "jpeg")).decode("ascii")
                yield {"event": "preview", **place, "preview": encoded}
        case Done(response):
            yield {"event": "done", "response": response.model_dump(mode="json")}
