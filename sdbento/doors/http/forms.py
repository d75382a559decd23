"""Forms (multipart/form-data) as JSON: `curl -F image=@in.png -F prompt=...` like a JSON body.

Every part is a field of the request. A file becomes its base64. The text of any other part is read
as JSON where the field is not a string (numbers, objects), as BentoML's client sends it, and is
taken literally where it is one.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from sdbento.errors import MalformedRequest
from sdbento.request.schema import GenerateRequest

MAX_PARTS = 100


def is_form(headers: Headers) -> bool:
    return headers.get("content-type", "").lower().startswith("multipart/form-data")


async def form_as_json(headers: Headers, body: bytes) -> bytes:
    """The fields of a form as a JSON object. Raises MalformedRequest."""

    async def stream() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(
        headers,
        stream(),  # type: ignore[arg-type]  # any async iterator will do
        max_files=MAX_PARTS,
        max_fields=MAX_PARTS,
        max_part_size=len(body),
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as exc:
        raise MalformedRequest(f"the form cannot be read: {exc}") from None
    try:
        return json.dumps({name: await _value(name, form) for name in form}).encode()
    finally:
        await form.close()


async def _value(name: str, form: FormData) -> Any:
    part = form[name]
    if isinstance(part, UploadFile):
        return b64encode(await part.read()).decode("ascii")
    try:
        value = json.loads(part)
    except ValueError:
        return part
    # BentoML's client sends strings as JSON too, in quotes, and curl without them: a prompt that
    # happens to be a number or a list in JSON is that text.
    return part if name in _string_fields() and not isinstance(value, str | None) else value


@cache
def _string_fields() -> frozenset[str]:
    properties = GenerateRequest.model_json_schema()["properties"]
    return frozenset(
        name
        for name, schema in properties.items()
        if any(option.get("type") == "string" for option in [schema, *schema.get("anyOf", ())])
    )
