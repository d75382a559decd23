"""Answers in OpenAI's shapes: images as base64 or URLs, and how they were made."""

from __future__ import annotations

import json
import re
import time
from base64 import b64encode
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, Field

from sdbento.doors.openai.order import Order
from sdbento.request.schema import OutputFormat

_WORDS = re.compile(r"\w+|[^\w\s]")


class ImageData(BaseModel):
    """One image: `b64_json` or `url`, never both."""

    b64_json: str | None = Field(None, description="Base64 of the file")
    url: str | None = Field(None, description="Where the file can be had for a while")


class InputTokens(BaseModel):
    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """Words and punctuation marks of the prompt; sdbento counts no tokens for images."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int = 0
    total_tokens: int


class ImagesAnswer(BaseModel):
    """What was made, in the shape of OpenAI's ImagesResponse."""

    created: int = Field(description="Seconds since 1970")
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: str
    size: str = Field(description="WIDTHxHEIGHT, as it was made")
    usage: Usage


def usage_of(prompt: str) -> Usage:
    count = len(_WORDS.findall(prompt))
    details = InputTokens(text_tokens=count)
    return Usage(input_tokens=count, input_tokens_details=details, total_tokens=count)


def size_in_words(size: tuple[int, int]) -> str:
    """WIDTHxHEIGHT."""
    return "{}x{}".format(*size)


def render(
    order: Order, size: tuple[int, int], images: Sequence[bytes], urls: Sequence[str] | None = None
) -> bytes:
    """The answer as JSON, with `urls` instead of the files in `images` where it has some. Blocking.

    `size`: width and height of the images.
    """
    if urls is None:
        data = [ImageData(b64_json=b64encode(image).decode("ascii")) for image in images]
    else:
        data = [ImageData(url=url) for url in urls]
    answer = ImagesAnswer(
        created=int(time.time()),
        data=data,
        output_format=order.request.output_format,
        quality=order.quality,
        size=size_in_words(size),
        usage=usage_of(order.request.prompt),
    )
    return answer.model_dump_json(exclude_none=True).encode()


def headers(order: Order, warnings: Sequence[str] = ()) -> dict[str, str]:
    """The model that was used, and all `warnings` beside those of the order, as a JSON list."""
    told: dict[str, Any] = {"X-SDBento-Model": quote(order.spec.name, safe="/ :@+,()")}
    if all_warnings := [*order.warnings, *warnings]:
        told["X-SDBento-Warnings"] = json.dumps(all_warnings)
    return told
