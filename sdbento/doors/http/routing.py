"""What the routes of all doors share: how they reach the App, read a body, and fail.

A door is an APIRouter that `door` has made; `mounted` makes one application of all of them. Typed
bodies and answers are FastAPI's; errors become answers in the Guard (see `failures`).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Scope

from sdbento.doors.error_shape import ErrorShape
from sdbento.doors.http import json_bounds
from sdbento.doors.http.failures import guarded
from sdbento.doors.http.forms import is_form
from sdbento.doors.network.parsers import parsed
from sdbento.errors import MalformedRequest, SDBentoError
from sdbento.request.parse import explain_first

T = TypeVar("T")


def app_of(request: Request) -> App:
    app: App = request.app.state.app
    return app


async def _app_of(request: Request) -> App:
    """FastAPI calls a function that is not async on a thread, which may have to be waited for."""
    return app_of(request)


# The App, as a parameter of a handler. FastAPI would want to import its class, and torch with it.
if TYPE_CHECKING:
    from sdbento.app import App

    TheApp = App
else:
    TheApp = Annotated[Any, Depends(_app_of)]


def shared(request: Request, kind: type[T], make: Callable[[], T]) -> T:
    """The one object of this `kind` that all requests to the server share; the first makes it."""
    state, name = request.app.state, f"shared_{kind.__module__}.{kind.__name__}"
    if not hasattr(state, name):
        setattr(state, name, make())
    found: T = getattr(state, name)
    return found


def door(tag: str) -> APIRouter:
    """The routes of one door; `tag` is their heading in the OpenAPI document."""
    return APIRouter(tags=[tag], route_class=DoorRoute)


def mounted(
    *doors: APIRouter,
    lifespan: Callable[[Any], AbstractAsyncContextManager[None]] | None = None,
    error_shapes: Mapping[str, ErrorShape] = MappingProxyType({}),
) -> FastAPI:
    """One application with all `doors`; its `state.app` must be set to the App.

    Its document says how errors look by `error_shapes`, which are those that the Guard has.
    """
    routes = FastAPI(
        openapi_url=None,
        lifespan=lifespan,
        exception_handlers={HTTPException: _unrouted(doors)},
    )
    routes.state.error_shapes = error_shapes
    for router in doors:
        routes.include_router(router)
    return routes


def routes_of(doors: Iterable[APIRouter]) -> list[APIRoute]:
    return [route for door in doors for route in door.routes if isinstance(route, APIRoute)]


def body_readers(doors: Iterable[APIRouter], paths: Iterable[str]) -> Callable[[str], bool]:
    """Whether a POST to a path may have a body: to one of `paths`, or to a route of `doors`."""
    known = frozenset(paths)
    patterns = [route.path_regex for route in routes_of(doors) if "POST" in (route.methods or ())]
    return lambda path: path in known or any(pattern.match(path) for pattern in patterns)


class DoorRoute(APIRoute):
    """A route that reads any body but a form as JSON, whatever its Content-Type says, and whose
    errors the Guard answers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        @guarded
        async def handle_or_fail(request: Request) -> Response:
            try:
                return await handle(_JSONRequest(request.scope, request.receive))
            except RequestValidationError as error:
                first = dict(error.errors()[0])
                first["loc"] = first["loc"][1:]  # without "body" or "query"
                raise explain_first(first) from None
            except HTTPException as error:  # by FastAPI, for whatever parsing the body raised
                if isinstance(error.__cause__, SDBentoError):
                    raise error.__cause__ from None
                raise MalformedRequest(f"the body cannot be read: {error.detail}") from None

        return handle_or_fail


class _JSONRequest(Request):
    """Says that its body is JSON, as `curl -d` does not, and parses it as RFC 8259 has it."""

    def __init__(self, scope: Scope, *args: Any) -> None:
        headers = MutableHeaders(raw=list(scope["headers"]))
        if not is_form(headers):
            headers["content-type"] = "application/json"
        super().__init__(dict(scope, headers=headers.raw), *args)

    async def json(self) -> Any:
        return await parsed(json_bounds.read, await self.body())


def _unrouted(doors: Iterable[APIRouter]) -> Callable[[Request, Exception], Any]:
    async def answer(request: Request, error: Exception) -> Response:
        """A bare answer where no route fits, which the Guard puts into words."""
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if error.status_code == 405:  # FastAPI names the methods of the first route of a path only
            headers["Allow"] = ", ".join(sorted(_methods(doors, request.scope["path"])))
        return PlainTextResponse(str(error.detail), error.status_code, headers=headers)

    return answer


def _methods(doors: Iterable[APIRouter], path: str) -> set[str]:
    """Those that the routes of a path take."""
    routes = (route for route in routes_of(doors) if route.path_regex.match(path))
    return {method for route in routes for method in route.methods or ()}
