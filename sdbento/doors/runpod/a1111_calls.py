"""Calls of AUTOMATIC1111's API from inside the process, for jobs: without network and Guard.

What a route refuses is raised, and not answered.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx
from starlette.applications import Starlette

from sdbento.doors.a1111.every import ROUTERS
from sdbento.doors.http.failures import watch
from sdbento.doors.http.routing import mounted
from sdbento.errors import InvalidParameter, NotFound
from sdbento.jobs.formats.a1111 import Call

if TYPE_CHECKING:
    from sdbento.app import App

MAX_DETAIL = 300  # characters of an answer that refuses


def routes_on(app: App) -> Starlette:
    """That door alone, on `app`, where no server has it."""
    routes = mounted(*ROUTERS)
    routes.state.app = app
    return routes


async def answer(routes: Starlette, call: Call) -> Any:
    """What `routes`, which have that door's, answer to a call: JSON.

    If this is cancelled, so is the work. Raises the route's SDBentoError.
    """
    failure = watch()
    body = await asyncio.to_thread(lambda: json.dumps(call.payload).encode())
    transport = httpx.ASGITransport(routes)
    async with httpx.AsyncClient(transport=transport, base_url="http://in-process") as client:
        response = await client.request(call.method, call.path, content=body)
    if failure.error is not None:
        raise failure.error
    if response.status_code in (404, 405):
        message = f"there is no {call.method} {call.path} here"
        raise NotFound(message, param="api.endpoint")
    if not response.is_success:
        raise InvalidParameter(response.text[:MAX_DETAIL], param="payload")
    return await asyncio.to_thread(response.json)
