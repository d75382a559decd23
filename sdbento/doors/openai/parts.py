"""The bodies of edits and variations, which are forms or JSON: fields, images, mask.

In forms OpenAI's SDKs repeat `image[]` for several images, and write objects and lists of their
`extra_body` in brackets: `refiner[switch_at]`, `lora[][model_id]`. In JSON the images are objects
with an `image_url`.
"""

from __future__ import annotations

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from sdbento.doors.docs.bodies import BINARY, FORM, JSON
from sdbento.doors.http.forms import is_form, read_parts, text_as_json
from sdbento.doors.openai.body import ImageBody
from sdbento.errors import InvalidParameter, MalformedRequest

_SOURCE = {
    "anyOf": [
        {"type": "string", "description": "https URL, data URI or base64"},
        {
            "type": "object",
            "required": ["image_url"],
            "properties": {"image_url": {"type": "string"}},
        },
    ]
}

_BRACKETS = re.compile(r"(\w+)(\[\d*\])?(?:\[(\w+)\])?")


@dataclass(frozen=True)
class Parts:
    """`images` and `mask` as requests have them (URL, data URI or base64); all else in `fields`."""

    fields: dict[str, Any]
    images: list[str]
    mask: str | None


async def read(request: Request) -> Parts:
    """Raises MalformedRequest, or InvalidParameter for images that are none."""
    body = await request.body()
    if is_form(request.headers):
        sent = await read_parts(request.headers, body)
        fields = await asyncio.to_thread(_from_form, sent)
    else:
        fields = await _from_json(request)
    images = [*_sources(fields.pop("image", None), "image")]
    images += _sources(fields.pop("images", None), "images")
    if not images:
        raise InvalidParameter("image is required", param="image")
    masks = _sources(fields.pop("mask", None), "mask")
    return Parts(fields, images, masks[0] if masks else None)


async def _from_json(request: Request) -> dict[str, Any]:
    fields = await request.json()
    if not isinstance(fields, dict):
        raise MalformedRequest("the body must be a JSON object or a form")
    return fields


def _from_form(parts: Iterable[tuple[str, str | bytes]]) -> dict[str, Any]:
    """Parts as one JSON object: bytes as base64, names in brackets as objects and lists."""
    fields: dict[str, Any] = {}
    for name, part in parts:
        value = b64encode(part).decode("ascii") if isinstance(part, bytes) else part
        brackets = _BRACKETS.fullmatch(name)
        field, is_list, key = brackets.groups() if brackets else (name, None, None)
        if field == "image":
            fields.setdefault(field, []).append(value)
        elif is_list:
            _append(_holder(fields, field, list), key, value)
        elif key:
            _holder(fields, field, dict)[key] = _leaf(value)
        else:
            fields[field] = value
    return fields


def _holder(fields: dict[str, Any], field: str, kind: type) -> Any:
    holder = fields.setdefault(field, kind())
    if not isinstance(holder, kind):
        raise MalformedRequest(f"the form has {field} both with brackets and without")
    return holder


def _append(items: list[Any], key: str | None, value: str) -> None:
    """To a list, or to the last of a list of objects, unless that one has such a key."""
    if key is None:
        items.append(_leaf(value))
    elif items and isinstance(items[-1], dict) and key not in items[-1]:
        items[-1][key] = _leaf(value)
    else:
        items.append({key: _leaf(value)})


def _leaf(text: str) -> Any:
    """What the text of a form stands for inside of a list or an object."""
    return text_as_json("a field in brackets", text)


def _sources(value: Any, param: str) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [source for item in items if (source := _source(item, param))]


def _source(item: Any, param: str) -> str | None:
    """Where an image is, or what it is. None: nothing was sent."""
    match item:
        case None | str():
            return item
        case {"image_url": str(url)} | {"image_url": {"url": str(url)}}:
            return url
        case {"b64_json": str(data)}:
            return data
        case {"file_id": _}:
            raise InvalidParameter(
                f"{param} names a file, but this server keeps none; send the image itself, or an "
                "image_url",
                param=param,
            )
    raise InvalidParameter(
        f"{param} must be a file of a form, base64, or an object with an image_url", param=param
    )


def describe(kind: type[ImageBody]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body `parts.read` reads and `kind` validates."""
    form = {"image": {"anyOf": [BINARY, {"type": "array", "items": BINARY}]}, "mask": BINARY}
    sources = {"type": "array", "minItems": 1, "items": _SOURCE}
    in_json = {"image": _SOURCE, "images": sources, "mask": _SOURCE}
    either = {"anyOf": [{"required": ["image"]}, {"required": ["images"]}]}
    content = {
        FORM: {"schema": _schema(kind, form, "image")},
        JSON: {"schema": _schema(kind, in_json) | either},
    }
    return {"requestBody": {"required": True, "content": content}}


def _schema(kind: type[ImageBody], images: dict[str, Any], *required: str) -> dict[str, Any]:
    """Without the fields that are objects, which refer to schemas of their own."""
    schema = kind.model_json_schema()
    fields = {
        name: field
        for name, field in schema["properties"].items()
        if name != "image" and "$ref" not in json.dumps(field)
    }
    return {
        "type": "object",
        "required": [*required, *schema.get("required", ())],
        "properties": images | fields,
    }
