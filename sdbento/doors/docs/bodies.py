"""Bodies of requests for the OpenAPI document, where a handler reads them by itself.

FastAPI describes the body that a handler takes as a parameter. Others, forms above all, are
described by the `openapi_extra` of their route: `openapi_extra={"requestBody": json_body(Model)}`.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

JSON = "application/json"
FORM = "multipart/form-data"
BINARY = {"type": "string", "format": "binary"}
IMAGE_FIELDS = ("image", "mask_image")


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """A body that is a `model` in JSON."""
    return {"required": True, "content": {JSON: {"schema": model.model_json_schema()}}}


def json_or_form_body(model: type[BaseModel]) -> dict[str, Any]:
    """The same in JSON, or as the parts of a form in which images are files."""
    body = json_body(model)
    form = model.model_json_schema()
    form["title"] += "Form"
    for name in IMAGE_FIELDS:
        description = form["properties"][name]["description"]
        form["properties"][name] = BINARY | {"description": description}
    body["content"][FORM] = {"schema": form}
    return body


def empty_counts_as_absent(schema: dict[str, Any]) -> None:
    """Say in the schema of a lenient body, as its `json_schema_extra`, that null and "" stand for
    no value in every field but the required ones.

    Defaults that are objects are left out: some generators of clients refuse them beside the empty
    text.
    """
    for name in schema["properties"].keys() - set(schema.get("required", ())):
        field = schema["properties"][name]
        if field.keys() & {"type", "$ref", "anyOf", "enum"}:
            kept = {key: field.pop(key) for key in ("description", "default") if key in field}
            if isinstance(kept.get("default"), dict):
                del kept["default"]
            options = field.get("anyOf", [field])
            schema["properties"][name] = {"anyOf": [*options, {"enum": [None, ""]}]} | kept
