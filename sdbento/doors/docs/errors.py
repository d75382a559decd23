"""What can go wrong, for every route of an OpenAPI document, in the shape of the route's door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdbento.doors.docs.schemas import Schema, operations, reference
from sdbento.doors.error_shape import OURS, ErrorShape
from sdbento.errors import (
    DeadlineExceeded,
    Forbidden,
    InvalidParameter,
    MalformedRequest,
    NotFound,
    Overloaded,
    SDBentoError,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnsupportedEncoding,
)

MEANINGS: dict[type[SDBentoError], str] = {
    MalformedRequest: "The request cannot be read",
    Unauthorized: "No key, or one that the server does not know",
    Forbidden: "The key does not allow this",
    NotFound: "What the request names is not there",
    TooLarge: "The body or an image in it is too large",
    UnsupportedEncoding: "The body is compressed",
    InvalidParameter: "A field is wrong, or fields do not go together",
    Overloaded: "Too many requests are waiting, or come from this key",
    SDBentoError: "An error of the server; its log explains the id in the message",
    Unavailable: "Something that is needed is not available now",
    DeadlineExceeded: "The request's timeout has passed, or cannot be met",
}
ANY_ROUTE = {SDBentoError, Unavailable}
WITH_KEY = {Unauthorized, Forbidden, Overloaded}
WITH_PARAMETERS = {MalformedRequest, NotFound, InvalidParameter}
WITH_BODY = {MalformedRequest, NotFound, TooLarge, UnsupportedEncoding}
WITH_BODY |= {InvalidParameter, DeadlineExceeded}
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
        answers.pop("422", None)  # FastAPI's, which the Guard replaces
        for status, meaning in _meanings(operation, shape).items():
            answers[str(status)] = {
                "description": meaning,
                "content": {"application/json": {"schema": schema}},
                "headers": HEADERS.get(status, {}),
            }
    for unused in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(unused, None)


def _meanings(operation: Schema, shape: ErrorShape) -> dict[int, str]:
    """What can go wrong, by the status that the door tells it with."""
    kinds = _kinds(operation)
    told: dict[int, str] = {}
    for kind, meaning in MEANINGS.items():
        if kind in kinds:
            status = shape.status(kind(meaning))
            told[status] = f"{told[status]}. {meaning}" if status in told else meaning
    return dict(sorted(told.items()))


def _kinds(operation: Schema) -> set[type[SDBentoError]]:
    kinds = set(ANY_ROUTE)
    if operation.get("security") != []:
        kinds |= WITH_KEY
    if operation.get("parameters"):
        kinds |= WITH_PARAMETERS
    if "requestBody" in operation:
        kinds |= WITH_BODY
    return kinds


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
