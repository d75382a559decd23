"""What the OpenAPI document says of bodies that are forms or JSON, which FastAPI does not read."""

from __future__ import annotations

import json
from typing import Any

from sdbento.doors.openai.body import ImageBody

_FILE = {"type": "string", "format": "binary"}
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


def describe_parts(kind: type[ImageBody]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body `parts.read` reads and `kind` validates."""
    form = {"image": {"anyOf": [_FILE, {"type": "array", "items": _FILE}]}, "mask": _FILE}
    sources = {"images": {"type": "array", "minItems": 1, "items": _SOURCE}, "mask": _SOURCE}
    content = {
        "multipart/form-data": {"schema": _schema(kind, form, "image")},
        "application/json": {"schema": _schema(kind, sources, "images")},
    }
    return {"requestBody": {"required": True, "content": content}}


def _schema(kind: type[ImageBody], images: dict[str, Any], image: str) -> dict[str, Any]:
    """Without the fields that are objects, which refer to schemas of their own."""
    schema = kind.model_json_schema()
    fields = {
        name: field
        for name, field in schema["properties"].items()
        if name != "image" and "$ref" not in json.dumps(field)
    }
    required = [image, *schema.get("required", ())]
    return {"type": "object", "required": required, "properties": images | fields}
