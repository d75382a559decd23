"""Checks the OpenAPI document of GET /docs.json: `make docs-check`.

A public validator must accept it, every route of the server must be in it, and every body must have
an example.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from fastapi.routing import iter_route_contexts
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.routing import BaseRoute, Mount, Route

import service
from sdbento.doors.docs.document import document
from sdbento.doors.docs.schemas import operations
from sdbento.doors.every import ERROR_SHAPES

AGAIN = "/v2/{endpoint_id}"  # before the job routes, which have been described without it


def written() -> dict[str, Any]:
    return document(service.routes, ERROR_SHAPES)


def problems(document: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the document, a line each."""
    for error in OpenAPIV31SpecValidator(document).iter_errors():
        yield f"{'/'.join(map(str, error.absolute_path))}: {error.message[:300]}"
    described = {(path, method) for path, method, _ in operations(document)}
    for path, method in sorted(set(served()) - described):
        yield f"{method.upper()} {path} is not in the document"
    for path, method in sorted(described - set(served())):
        yield f"{method.upper()} {path} is in the document, but not served"
    for path, method, operation in operations(document):
        for kind, media in operation.get("requestBody", {}).get("content", {}).items():
            if kind == "application/json" and "example" not in media:
                yield f"{method.upper()} {path} has no example"


def served() -> Iterator[tuple[str, str]]:
    """Path and method of every route of the server, as the document has them.

    Left out are files of a page of BentoML's that our /docs replaces, and methods of HTTP itself.
    """
    app: Any = service.StableDiffusion
    for path, methods in _walk(app.to_asgi().routes):
        name = re.sub(r":\w+}", "}", path).rstrip("/") or "/"  # some also end in one
        if not path.startswith(AGAIN):
            yield from ((name, method.lower()) for method in methods - {"HEAD", "OPTIONS"})


def _walk(routes: Iterable[BaseRoute]) -> Iterator[tuple[str, set[str]]]:
    for route in routes:
        if isinstance(route, Mount):
            mounted = iter_route_contexts(route.routes)
            yield from ((f"{route.path}{inner.path}", inner.methods or set()) for inner in mounted)
        elif isinstance(route, Route):
            yield route.path, route.methods or set()


def main() -> None:
    found = list(problems(written()))
    print(*found, sep="\n", file=sys.stderr)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
