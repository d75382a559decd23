"""GET /ping for RunPod's load balancer: 204 while loading, 200 when ready, 503 when broken.

It is a route of the server. Where PORT_HEALTH names another port, a small server of its own
answers it there, and answers nothing else.
"""

from __future__ import annotations

import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from starlette.responses import Response

from sdbento.doors.http.routing import TheApp, door
from sdbento.settings import Settings, SettingsError

if TYPE_CHECKING:
    from sdbento.app import App

REQUEST_TIMEOUT = 5.0  # seconds in which a client of the listener must send its request


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
    """Answers GET /ping on its own port, with its own threads, until it is closed."""

    def __init__(self, app: App, port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_TIMEOUT

            def do_GET(self) -> None:
                known = self.path.partition("?")[0] == "/ping"
                self.send_response(status_of(app) if known else HTTPStatus.NOT_FOUND)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Log nothing: the load balancer asks every few seconds."""

        try:
            self._server = ThreadingHTTPServer(("", port), Handler)
        except OSError as error:
            reason = str(error.strerror).lower()
            raise SettingsError(f"PORT_HEALTH={port}: cannot listen there: {reason}") from None
        self._server.daemon_threads = True
        threading.Thread(
            target=self._server.serve_forever, name="sdbento-health", daemon=True
        ).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def listen(app: App, settings: Settings) -> HealthListener | None:
    """The listener, if the settings want one. Raises SettingsError when the port is taken."""
    if settings.port_health in (None, settings.port):
        return None
    return HealthListener(app, settings.port_health)
