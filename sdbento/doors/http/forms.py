"""Forms as JSON: `curl -F image=@in.png -F prompt=...` like a JSON body.

Every part is a field of the request. A file becomes its base64. The text of any other part is read
as JSON where the field is not a string (numbers, objects), as BentoML's client sends it, and is
taken literally where it is one. BentoML's client sends its forms as multipart/form-data if there is
a file in them, and else as application/x-www-form-urlencoded.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Coroutine, Iterable
from functools import cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from sdbento.doors.http.json_bounds import MAX_PART_VALUES, check
from sdbento.doors.network.parsers import parsed
from sdbento.errors import MalformedRequest, TooLarge
from sdbento.request.schema import GenerateRequest

T = TypeVar("T")

URLENCODED = "application/x-www-form-urlencoded"
MAX_PARTS = 100
# Python makes an object for each byte that is written as %41, and it takes a second for so many.
# The base64 of the largest image has as many of + and /; who sends more can send multipart.
MAX_ESCAPES = 1_000_000
_STRING_OR_NULL = re.compile(r'\s*("|null\s*$)')
# The body begins so if BentoML's client was called with a whole request as its one argument.
_WHOLE_REQUEST = re.compile(rb'\s*\{\s*"prompt"\s*:\s*\{')


def is_form(headers: Headers) -> bool:
    return headers.get("content-type", "").lower().startswith("multipart/form-data")


async def body_as_json(headers: Headers, body: bytes) -> bytes:
    """The body of a typed endpoint as JSON, if it is a form. Raises MalformedRequest, TooLarge.

    `curl -d` says of any body that it is urlencoded, so only one that cannot be JSON is.
    """
    if is_form(headers):
        return await form_as_json(headers, body)
    urlencoded = headers.get("content-type", "").lower().startswith(URLENCODED)
    if urlencoded and body.lstrip()[:1] not in (b"", b"{", b"["):
        return await parsed(_urlencoded_as_json, body)
    if _WHOLE_REQUEST.match(body):
        return await parsed(_whole_request, body)
    return body


async def form_as_json(headers: Headers, body: bytes) -> bytes:
    """The fields of a form as a JSON object. Raises MalformedRequest, TooLarge."""
    return await parsed(lambda form: _as_json(_parts(form, headers)), body)


async def read_parts(headers: Headers, body: bytes) -> list[tuple[str, str | bytes]]:
    """The names and contents of a form's parts, in their order: bytes of files, text of others.

    Raises MalformedRequest.
    """
    return await parsed(_parts, body, headers)


def _parts(body: bytes, headers: Headers) -> list[tuple[str, str | bytes]]:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(
        headers,
        stream(),  # type: ignore[arg-type]  # any async iterator will do
        max_files=MAX_PARTS,
        max_fields=MAX_PARTS,
        max_part_size=len(body),
    )
    # No part goes to the disk, so there is nothing to wait for.
    parser.spool_max_size = len(body) + 1
    try:
        form = _run(parser.parse())
        return [
            (name, part.file.read() if isinstance(part, UploadFile) else part)
            for name, part in form.multi_items()
        ]
    except (MultiPartException, KeyError, ValueError) as exc:
        raise MalformedRequest(f"the form cannot be read: {exc}") from None
    finally:
        for file in parser._files_to_close_on_error:  # that of a part that was cut off as well
            file.close()


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise RuntimeError("a form waited for something while it was parsed")


def _as_json(parts: Iterable[tuple[str, str | bytes]]) -> bytes:
    return json.dumps({name: _value(name, part) for name, part in parts}).encode()


def _value(name: str, part: str | bytes) -> Any:
    if isinstance(part, bytes):
        return b64encode(part).decode("ascii")
    return _text_value(name, part)


def _text_value(name: str, text: str) -> Any:
    # BentoML's client sends strings as JSON too, in quotes, and curl without them: a prompt that
    # happens to be a number or a list in JSON is that text.
    if name in string_fields() and not _STRING_OR_NULL.match(text):
        return text
    return text_as_json(name, text)


def text_as_json(name: str, text: str) -> Any:
    """The value of a field whose text may be JSON, else the text. Raises TooLarge if it is more
    than a field may be."""
    check(text.encode("utf-8", "surrogatepass"), name[:80], MAX_PART_VALUES)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _urlencoded_as_json(body: bytes) -> bytes:
    if body.count(b"%") > MAX_ESCAPES:
        raise TooLarge(
            f"an urlencoded form may have at most {MAX_ESCAPES} escaped characters; send "
            "multipart/form-data or JSON"
        )
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
    return _as_json(parts.items())


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
