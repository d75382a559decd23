"""What can go wrong, for every route of an OpenAPI document, in the shape of the route's door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdbento.doors.docs.schemas import Schema, operations, reference
from sdbento.doors.http.failures import OURS, ErrorShape
from sdbento.errors import InvalidParameter, SDBentoError

MEANINGS = {
    400: "The request cannot be read",
    401: "No key, or one that the server does not know",
    403: "The key does not allow this",
    404: "What the request names is not there",
    413: "The body or an image in it is too large",
    422: "A field is wrong, or fields do not go together",
    429: "Too many requests are waiting, or come from this key",
    500: "An error of the server; its log explains the id in the message",
    503: "Something that is needed is not available now",
    504: "The request's timeout has passed, or cannot be met",
}
ANY_ROUTE = {500, 503}
WITH_KEY = {401, 403, 429}
WITH_PARAMETERS = {400, 404, 422}
WITH_BODY = {400, 404, 413, 422, 504}
SECONDS = {"description": "Seconds until it is worth trying again", "schema": {"type": "integer"}}
SCHEME = {"description": "How to send a key", "schema": {"type": "string"}}
HEADERS = {
    401: {"WWW-Authenticate": SCHEME},
    429: {"Retry-After": SECONDS},
    503: {"Retry-After": SECONDS},
}


def add_errors(document: Schema, shapes: Mapping[str, ErrorShape]) -> None:
    """Describe the answers of errors of every route; `shapes` by prefix of the path."""
    for path, _, operation in operations(document):
        prefix = next((prefix for prefix in shapes if path.startswith(prefix)), "")
        shape = shapes.get(prefix, OURS)
        name = "_".join(["Error", *prefix.strip("/").split("/")]).strip("_")
        schema = reference(name, _schema_of(shape), document)
        answers = operation.setdefault("responses", {})
        for status in sorted(_statuses(operation)):
            answers[str(status)] = {
                "description": MEANINGS[status],
                "content": {"application/json": {"schema": schema}},
                "headers": HEADERS.get(status, {}),
            }
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's, which the Guard replaces
        document["components"]["schemas"].pop(unused, None)


def _statuses(operation: Schema) -> set[int]:
    statuses = set(ANY_ROUTE)
    if operation.get("security") != []:
        statuses |= WITH_KEY
    if operation.get("parameters"):
        statuses |= WITH_PARAMETERS
    if "requestBody" in operation:
        statuses |= WITH_BODY
    return statuses


def _schema_of(shape: ErrorShape) -> Schema:
    """The schema of a door's errors, read off two of them."""
    with_parameter = InvalidParameter("seed must be a number", param="seed")
    return _generalised(shape.body(SDBentoError("unexpected error")), shape.body(with_parameter))


def _generalised(*values: Any) -> Schema:
    """The narrowest schema that fits all `values`, which are of JSON."""
    objects = [value for value in values if isinstance(value, dict)]
    if len(objects) == len(values):
        names = list(objects[0])
        properties = {name: _generalised(*(value[name] for value in objects)) for name in names}
        return {"type": "object", "properties": properties, "required": names}
    types = sorted({_TYPES[type(value)] for value in values})
    return {"type": types[0] if len(types) == 1 else types}


_TYPES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    list: "array",
    dict: "object",
}
