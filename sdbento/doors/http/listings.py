"""GET /models and GET /samplers, which BentoML's own routes (POST only) cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from sdbento.app import App


async def list_models(request: Request) -> JSONResponse:
    app: App = request.app.state.app
    return JSONResponse({"models": await run_in_threadpool(app.list_models)})


async def list_samplers(request: Request) -> JSONResponse:
    app: App = request.app.state.app
    return JSONResponse({"samplers": app.list_samplers()})


def create() -> Starlette:
    """The mounted app; whoever makes the App puts it into `state.app`."""
    return Starlette(routes=[Route("/models", list_models), Route("/samplers", list_samplers)])
