"""What /metrics and traces call requests: by routes, `/status/{id}`, not as clients asked for them.

BentoML's middleware for metrics keeps counters for every path that was ever asked for, whether it
exists or not. Whoever reads them would learn the ids of jobs and the addresses of images that
belong to others, and strangers could fill the memory with paths that they make up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastapi import APIRouter
from starlette.types import ASGIApp, Receive, Scope, Send

from sdbento.doors.http.routing import routes_of

OTHERS = "others"  # what all paths without a route are called together
BENTOML = ("/", "/livez", "/readyz", "/healthz", "/metrics", "/schema.json", "/docs.json")
_ASKED = "sdbento.asked"  # the key of the client's own scope in the one that the middleware sees

Middleware = Callable[..., ASGIApp]


class RouteLabels:
    """The routes of `doors`, and other paths that exist."""

    def __init__(self, doors: Iterable[APIRouter], paths: Iterable[str]) -> None:
        self._paths = frozenset((*BENTOML, *paths))
        self._routes = routes_of(doors)

    def label(self, path: str) -> str:
        path = path.rstrip("/") or path  # as the Guard has it
        if path in self._paths:
            return path
        found = (route.path_format for route in self._routes if route.path_regex.match(path))
        return next(found, OTHERS)

    def around(self, middleware: Middleware) -> Middleware:
        """`middleware`, which sees routes in place of paths; what it wraps sees the paths."""

        def labelled(app: ASGIApp, **options: Any) -> ASGIApp:
            async def asked(scope: Scope, receive: Receive, send: Send) -> None:
                await app(scope.get(_ASKED, scope), receive, send)

            inner = middleware(asked, **options)

            async def label_first(scope: Scope, receive: Receive, send: Send) -> None:
                if "path" not in scope:  # the lifespan
                    await inner(scope, receive, send)
                    return
                label = self.label(scope["path"])
                seen = {**scope, "path": label, "query_string": b"", _ASKED: scope}
                await inner(seen, receive, send)

            return label_first

        return labelled
