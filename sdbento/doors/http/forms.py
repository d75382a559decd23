"""Forms as JSON: `curl -F image=@in.png -F prompt=...` like a JSON body.

Every part is a field of the request. A file becomes its base64. The text of any other part is read
as JSON where the field is not a string (numbers, objects), as BentoML's client sends it, and is
taken literally where it is one. BentoML's client sends its forms as multipart/form-data if there is
a file in them, and else as application/x-www-form-urlencoded.
"""

from __future__ import annotations

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import AsyncIterator
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from sdbento.errors import MalformedRequest
from sdbento.request.schema import GenerateRequest

URLENCODED = "application/x-www-form-urlencoded"
MAX_PARTS = 100
# The body begins so if BentoML's client was called with a whole request as its one argument.
_WHOLE_REQUEST = re.compile(rb'\s*\{\s*"prompt"\s*:\s*\{')


def is_form(headers: Headers) -> bool:
    return headers.get("content-type", "").lower().startswith("multipart/form-data")


async def body_as_json(headers: Headers, body: bytes) -> bytes:
    """The body of a typed endpoint as JSON, if it is a form. Raises MalformedRequest.

    `curl -d` says of any body that it is urlencoded, so only one that cannot be JSON is.
    """
    if is_form(headers):
        return await form_as_json(headers, body)
    urlencoded = headers.get("content-type", "").lower().startswith(URLENCODED)
    if urlencoded and body.lstrip()[:1] not in (b"", b"{", b"["):
        return await asyncio.to_thread(_urlencoded_as_json, body)
    if _WHOLE_REQUEST.match(body):
        return await asyncio.to_thread(_whole_request, body)
    return body


async def form_as_json(headers: Headers, body: bytes) -> bytes:
    """The fields of a form as a JSON object. Raises MalformedRequest."""
    parts = await read_parts(headers, body)
    return json.dumps({name: _value(name, part) for name, part in parts}).encode()


async def read_parts(headers: Headers, body: bytes) -> list[tuple[str, str | bytes]]:
    """The names and contents of a form's parts, in their order: bytes of files, text of others.

    Raises MalformedRequest.
    """

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
        return [
            (name, await part.read() if isinstance(part, UploadFile) else part)
            for name, part in form.multi_items()
        ]
    finally:
        await form.close()


def _value(name: str, part: str | bytes) -> Any:
    if isinstance(part, bytes):
        return b64encode(part).decode("ascii")
    return _text_value(name, part)


def _text_value(name: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    # BentoML's client sends strings as JSON too, in quotes, and curl without them: a prompt that
    # happens to be a number or a list in JSON is that text.
    return text if name in string_fields() and not isinstance(value, str | None) else value


def _urlencoded_as_json(body: bytes) -> bytes:
    try:
        parts = dict(
            parse_qsl(
                body.decode(), keep_blank_values=True, strict_parsing=True, max_num_fields=MAX_PARTS
            )
        )
    except ValueError as exc:
        raise MalformedRequest(f"the body is neither JSON nor a form: {exc}") from None
    if list(parts) == ["prompt"] and parts["prompt"].startswith("{"):
        return parts["prompt"].encode()  # as in `_whole_request`
    return json.dumps({name: _text_value(name, text) for name, text in parts.items()}).encode()


def _whole_request(body: bytes) -> bytes:
    """The request in `{"prompt": {...}}`: `client.txt2img({...})` takes its one argument for the
    first field."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return body
    return json.dumps(fields["prompt"]).encode() if len(fields) == 1 else body


@cache
def string_fields() -> frozenset[str]:
    """The fields of a request whose values may be text."""
    properties = GenerateRequest.model_json_schema()["properties"]
    return frozenset(
        name
        for name, schema in properties.items()
        if any(option.get("type") == "string" for option in [schema, *schema.get("anyOf", ())])
    )
