"""Images as these routes take them and answer them: base64, which may be within a data URI."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from sdbento.background import ThreadPool
from sdbento.outbound import is_url

# Few, because each may hold an image of the largest size.
threads = ThreadPool(2, "sdbento-images")


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
