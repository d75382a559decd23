"""GET /models and GET /samplers, as Starlette routes because BentoML's own take only POST."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


ROUTES = [Route("/models", list_models), Route("/samplers", list_samplers)]
