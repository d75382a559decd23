"""What happens to a request, and in the batch, as objects: made of the server's messages."""

from __future__ import annotations

import json
from base64 import b64decode
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from PIL import Image
from pydantic import TypeAdapter

from sdbento.client.answers import Generation, to_generation
from sdbento.client.errors import NoAnswer, NotUnderstood, error_told
from sdbento.live.batch import Batch

_BATCH = TypeAdapter(Batch)


@dataclass(frozen=True)
class Queued:
    """The request waits beside `position` others.

    eta: seconds until it is done; None before its models are in memory.
    """

    position: int
    eta: float | None


@dataclass(frozen=True)
class Step:
    """The image of this index has done `step` of `num_steps`. `eta`: seconds until all is done."""

    image: int
    step: int
    num_steps: int
    eta: float


@dataclass(frozen=True)
class Preview:
    """What the image of this index looks like after `step`: `data` is a small JPEG."""

    image: int
    step: int
    num_steps: int
    data: bytes = field(repr=False)

    def to_pil(self) -> Image.Image:
        image = Image.open(BytesIO(self.data))
        image.load()
        return image


@dataclass(frozen=True)
class Done:
    """The last event: all images are there."""

    generation: Generation


Event = Queued | Step | Preview | Done


def to_event(message: dict[str, Any]) -> Event | None:
    """The event that a message tells of; None for a kind that this client does not know.

    Raises the SDBentoError of an `error` event, and NotUnderstood.
    """
    try:
        match message["event"]:
            case "queued":
                return Queued(message["position"], message["eta"])
            case "step":
                return Step(*_place(message), message["eta"])
            case "preview":
                return Preview(*_place(message), b64decode(message["preview"]))
            case "done":
                return Done(to_generation(message["response"]))
            case "error":
                raise error_told(dict(message["error"]))
    except (ValueError, TypeError, KeyError) as error:
        raise NotUnderstood(f"an event could not be read: {str(error)[:500]}") from error
    return None


def to_batch(message: dict[str, Any]) -> Batch:
    """The snapshot that a message of /batch is; a newer server may tell more. Raises NotUnderstood,
    or the SDBentoError of an `error` event."""
    if message.get("event") == "error":
        raise error_told(dict(message["error"]))
    try:
        return _BATCH.validate_python(message)
    except ValueError as error:
        raise NotUnderstood(f"a snapshot could not be read: {str(error)[:500]}") from error


def check_told(batch: Batch | None) -> None:
    """Raises NoAnswer after a stream without a snapshot: asking again might never end."""
    if batch is None:
        raise NoAnswer("the stream ended before it told what runs")


def _place(message: dict[str, Any]) -> tuple[int, int, int]:
    return message["image"], message["step"], message["num_steps"]


def message_in(line: str) -> dict[str, Any] | None:
    """The message in a line of server-sent events, if there is one: ours take one line each."""
    name, _, value = line.partition(":")
    if name != "data":
        return None
    try:
        return dict(json.loads(value))
    except (ValueError, TypeError) as error:
        raise NotUnderstood(f"an event is not a JSON object: {value[:80]!r}") from error


class Progress:
    """What the messages of one request have told so far."""

    def __init__(self, num_images: int) -> None:
        self.generation: Generation | None = None
        self._num_images = num_images
        self._shares: dict[int, float] = {}

    def take(self, message: dict[str, Any]) -> Event | None:
        """The event of the message, as `to_event`."""
        match event := to_event(message):
            case Step(image, step, num_steps):
                self._shares[image] = step / num_steps
            case Done(generation):
                self.generation = generation
        return event

    @property
    def share(self) -> float:
        """How much is done, from 0 to 1: the mean of the images."""
        if self.generation is not None:
            return 1.0
        return sum(self._shares.values()) / self._num_images
