"""One OpenAPI 3.1 document of every route that the server answers.

The routes of the doors are described by FastAPI, and so are those of BentoML, which it does not
serve. What all routes have in common is added here: what can go wrong, names, and examples.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from sdbento import __version__
from sdbento.doors.docs.bodies import JSON
from sdbento.doors.docs.errors import add_errors
from sdbento.doors.docs.examples import EXAMPLES
from sdbento.doors.docs.schemas import Schema, name_schemas, operations
from sdbento.doors.docs.served_by_bentoml import described
from sdbento.doors.error_shape import ErrorShape
from sdbento.doors.http.gate import OPEN_PATHS

DESCRIPTION = """\
Stable Diffusion with step-level continuous batching.

If the server has keys, send one as a bearer token, or as the password of Basic with any user."""
TAGS = {
    "Images": "Requests with all fields, as JSON or as a form.",
    "Models": "What requests can name.",
    "Batch": "What runs at the moment.",
    "OpenAI images": "OpenAI's images API, with our fields besides OpenAI's.",
    "OpenAI models": "What OpenAI's clients list.",
    "AUTOMATIC1111": "The API of AUTOMATIC1111's web UI.",
    "Jobs": "RunPod's job API. Each route is also there with any /v2/{endpoint_id} before it.",
    "Health": "For load balancers and monitoring.",
    "Documents": "What you are reading, and what clients read.",
}
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "basic": {"type": "http", "scheme": "basic"},
}


def document(app: FastAPI, shapes: Mapping[str, ErrorShape], *, needs_keys: bool = True) -> Schema:
    """The document of the routes of `app` and of BentoML; `shapes` of errors as the Guard's.

    `needs_keys`: whether the server has keys, or answers everybody.
    """
    written = _described_by_fastapi(app)
    written["components"]["securitySchemes"] = KEYS
    written["security"] = [{name: []} for name in KEYS] + ([] if needs_keys else [{}])
    for methods in written["paths"].values():
        methods.pop("head", None)  # it goes without saying where there is GET
    for path, method, operation in operations(written):
        operation["operationId"] = _name(path, method, only=len(written["paths"][path]) == 1)
        _describe_path(operation, path)
        _summarise(operation)
        if path in OPEN_PATHS:
            operation["security"] = []
        if path in EXAMPLES and "requestBody" in operation:
            operation["requestBody"]["content"][JSON]["example"] = EXAMPLES[path]
    name_schemas(written)
    add_errors(written, shapes)
    return written


def _described_by_fastapi(app: FastAPI) -> Schema:
    with warnings.catch_warnings():
        # FastAPI gives one name to all methods of a route; `_name` gives them others.
        warnings.filterwarnings("ignore", "Duplicate Operation ID")
        return get_openapi(
            title="sdbento",
            version=__version__,
            description=DESCRIPTION,
            routes=[*described().routes, *app.routes],
            tags=[{"name": name, "description": text} for name, text in TAGS.items()],
            license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        )


def _name(path: str, method: str, *, only: bool) -> str:
    """A name for an operation that no other has: generated clients call their functions so."""
    words = re.findall(r"\w+", path) or ["index"]
    return "_".join(words if only else [*words, method])


def _describe_path(operation: Schema, path: str) -> None:
    """Add the parameters in the path that the handler reads by itself."""
    parameters = operation.setdefault("parameters", [])
    known = {parameter["name"] for parameter in parameters if parameter["in"] == "path"}
    for name in re.findall(r"\{(\w+)\}", path):
        if name not in known:
            schema = {"type": "string"}
            parameters.append({"name": name, "in": "path", "required": True, "schema": schema})


def _summarise(operation: Schema) -> None:
    """A handler's docstring as summary, where FastAPI has made one of the handler's name."""
    if text := operation.get("description"):
        first, _, rest = text.partition("\n\n")
        operation["summary"] = " ".join(first.split()).removesuffix(".")
        operation["description"] = rest
