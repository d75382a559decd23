"""GET /ping for RunPod's load balancer: 204 while loading, 200 when ready, 503 when broken.

It is a route of the server. Where PORT_HEALTH names another port, a small server of its own
answers it there, and answers nothing else.
"""

from __future__ import annotations

import socket
import threading
from http import HTTPStatus
from typing import TYPE_CHECKING

import uvicorn
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sdbento.doors.http.routing import TheApp, door
from sdbento.doors.network.limits import Limits
from sdbento.doors.network.protocol import bounded
from sdbento.settings import Settings, SettingsError

if TYPE_CHECKING:
    from sdbento.app import App

# Of the listener, which a load balancer asks every few seconds: much less than the server's.
LIMITS = Limits(connections=100, head_bytes=8 * 1024, head_seconds=5.0, body_seconds=5.0)
CLOSE_SECONDS = 5.0


def status_of(app: App) -> HTTPStatus:
    """The load balancer sends requests at 200, waits at 204, and replaces the worker otherwise."""
    if not app.alive:
        return HTTPStatus.SERVICE_UNAVAILABLE
    return HTTPStatus.OK if app.ready else HTTPStatus.NO_CONTENT


router = door("Health")


@router.get("/ping", response_class=Response, responses={204: {"description": "Loading"}})
async def ping(app: TheApp) -> Response:
    """For RunPod's load balancer: whether requests can be sent, by the status alone."""
    return Response(status_code=status_of(app))


class HealthListener:
    """Answers GET /ping on its own port, in its own thread, until it is closed."""

    def __init__(self, app: App, port: int) -> None:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            status = status_of(app) if scope["path"] == "/ping" else HTTPStatus.NOT_FOUND
            if scope["method"] not in ("GET", "HEAD"):
                status = HTTPStatus.METHOD_NOT_ALLOWED
            await Response(status_code=status)(scope, receive, send)

        try:
            self._socket = socket.create_server(("", port), backlog=LIMITS.connections)
        except OSError as error:
            reason = str(error.strerror).lower()
            raise SettingsError(f"PORT_HEALTH={port}: cannot listen there: {reason}") from None
        self._server = uvicorn.Server(
            uvicorn.Config(
                answer, http=bounded(LIMITS), lifespan="off", log_config=None, server_header=False
            )
        )
        self._thread = threading.Thread(
            target=self._server.run, args=[[self._socket]], name="sdbento-health", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(CLOSE_SECONDS)


def listen(app: App, settings: Settings) -> HealthListener | None:
    """The listener, if the settings want one. Raises SettingsError when the port is taken."""
    if settings.port_health in (None, settings.port):
        return None
    return HealthListener(app, settings.port_health)
