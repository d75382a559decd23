"""What a client asks for as a GenerateRequest: the model, size and steps that it means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sdbento.catalog.specs import ModelSpec
from sdbento.doors.openai.body import ImageBody
from sdbento.doors.openai.models import meant
from sdbento.errors import InvalidParameter, SDBentoError
from sdbento.request.schema import MAX_SIDE, MAX_STEPS, GenerateRequest, nearest_side

if TYPE_CHECKING:
    from sdbento.app import App

SHARES = {"low": 0.5, "high": 1.5, "hd": 1.5, "xhigh": 2.0, "max": 2.0}  # of the model's steps
DISTILLED_STEPS = 8  # a model with so few steps was made for just that many

_SIZE = re.compile(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", re.ASCII)


@dataclass(frozen=True)
class Order:
    """`request` is what `body` asks for of the model `spec`; `warnings`: what is not as it says."""

    body: ImageBody
    request: GenerateRequest
    spec: ModelSpec
    warnings: tuple[str, ...]

    @property
    def wants_urls(self) -> bool:
        if self.body.response_format is not None:
            return self.body.response_format == "url"
        return (self.body.model or "").lower().startswith("dall-e")

    @property
    def quality(self) -> str:
        """In the words that OpenAI answers with."""
        quality = self.body.quality or "auto"
        return {"auto": "medium", "standard": "medium", "hd": "high"}.get(quality, quality)

    def with_fields(self, **fields: Any) -> Order:
        """The same with these fields of its request."""
        return replace(self, request=self.request.model_copy(update=fields))

    def with_warnings(self, *warnings: str) -> Order:
        return replace(self, warnings=(*self.warnings, *warnings))


async def to_order(app: App, body: ImageBody) -> Order:
    """Raises errors of the `errors` tree."""
    if body.background == "transparent":
        raise InvalidParameter(
            "background cannot be transparent: these models paint every pixel", param="background"
        )
    name, spec = await meant(app, body.model)
    warnings = []
    if body.model is not None and name is None:
        warnings.append(f"there is no model {body.model[:80]!r} here: {spec.name} was used")
    if body.stream and body.response_format == "url":
        warnings.append("streams have images as b64_json only")
    fields = {field: getattr(body, field) for field in GenerateRequest.model_fields}
    fields |= {"model": name, **_size(body, warnings), **_steps(body, spec, warnings)}
    return Order(body, GenerateRequest.model_construct(**fields), spec, tuple(warnings))


@contextmanager
def in_clients_words(body: ImageBody) -> Iterator[None]:
    """An error about a field that came under another name names that one."""
    try:
        yield
    except SDBentoError as error:
        if error.param in ("width", "height") and body.size is not None:
            error.param = "size"
        elif error.param == "num_images":
            error.param = "n"
        raise


def _size(body: ImageBody, warnings: list[str]) -> dict[str, int]:
    """Width and height, as far as `size` decides them. Raises InvalidParameter."""
    if body.size is None or body.size.strip().lower() == "auto":
        return {}
    match = _SIZE.fullmatch(body.size)
    asked = (0, 0) if match is None else (int(match[1]), int(match[2]))
    if not all(0 < side <= MAX_SIDE for side in asked):
        raise InvalidParameter(
            f"size must be auto or WIDTHxHEIGHT, with sides up to {MAX_SIDE} pixels; given: "
            f"{body.size[:80]!r}",
            param="size",
        )
    width, height = (nearest_side(side) for side in asked)
    if (width, height) != asked:
        warnings.append(f"size {asked[0]}x{asked[1]} was rounded to {width}x{height}")
    return {"width": body.width or width, "height": body.height or height}


def _steps(body: ImageBody, spec: ModelSpec, warnings: list[str]) -> dict[str, int]:
    """The steps that `quality` asks for."""
    share = SHARES.get(body.quality or "auto", 1.0)
    if share == 1.0:
        return {}
    if body.num_inference_steps is not None:
        warnings.append("quality has no effect where the steps are given")
        return {}
    if spec.num_inference_steps <= DISTILLED_STEPS:
        warnings.append(f"quality has no effect on {spec.name}, which is made for few steps")
        return {}
    return {"num_inference_steps": min(MAX_STEPS, round(share * spec.num_inference_steps))}
