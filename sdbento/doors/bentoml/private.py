"""Parts of BentoML (1.4) that cannot be turned off, and are replaced before it makes the server.

They are private: where another version has none by that name, the server serves with whatever that
version does, and says so in its log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from logging import Formatter
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from sdbento.doors.bentoml.labels import RouteLabels
from sdbento.doors.network.limits import Limits
from sdbento.doors.network.protocol import bounded
from sdbento.telemetry import spans
from sdbento.telemetry.log_format import use_everywhere

log = logging.getLogger(__name__)

HTTP = "bentoml._internal.server.http"
PEER = "sdbento.peer"  # the key of the client, as it was, in the ASGI scope


def leave_out_timeouts(module: str = f"{HTTP}.traffic") -> None:
    """Serve without the middleware for timeouts.

    It starts a timer for each request, even a health check, that keeps 5 KB of it until the
    timeout, however soon the request is answered: memory grows with the number of requests. The
    engine has its own deadlines.
    """
    _replace(module, "TimeoutMiddleware", lambda _: lambda app, **__: app)


def count_by_route(labels: RouteLabels, module: str = f"{HTTP}.instruments") -> None:
    """Let metrics count by route, not by what clients asked for; see `labels`."""
    _replace(module, "RunnerTrafficMetricsMiddleware", labels.around)


def keep_addresses(module: str = "uvicorn.config") -> None:
    """Serve with the address that each request comes from.

    uvicorn takes another one from X-Forwarded-For if that is loopback: every program on this
    machine, and every client of a proxy here that adds to what it was sent, could invent addresses.
    Which proxies are trusted is for SDBENTO_TRUSTED_PROXIES to say. The scheme is left to uvicorn.
    """
    _replace(module, "ProxyHeadersMiddleware", _without_addresses)


def _without_addresses(middleware: Callable[..., ASGIApp]) -> Callable[..., ASGIApp]:
    def around(app: ASGIApp, **options: Any) -> ASGIApp:
        async def inside(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "client": scope[PEER]}, receive, send)

        changing = middleware(inside, **options)

        async def outside(scope: Scope, receive: Receive, send: Send) -> None:
            await changing({**scope, PEER: scope.get("client")}, receive, send)

        return outside

    return around


def keep_metrics_in_memory(module: str = "prometheus_client.values") -> None:
    """Keep metrics in this process, not in mapped files, which several processes could share.

    There is only one. And a full disk would kill it: a write to a mapped page for which there is no
    room is a SIGBUS.
    """
    try:
        container = import_module("bentoml._internal.configuration.containers").BentoMLContainer
        client = import_module("bentoml._internal.server.metrics.prometheus").PrometheusClient
        container.metrics_client.set(client(multiproc=False))
    except (ImportError, AttributeError, TypeError):
        log.warning("BentoML %s keeps its metrics in files", version("bentoml"))
    _replace(module, "ValueClass", lambda _: import_module(module).MutexValue)


def bound_connections(limits: Limits, module: str = "uvicorn.protocols.http.auto") -> None:
    """Let uvicorn, which BentoML starts without a way to say so, make connections that are bounded;
    see `network/protocol`."""
    _replace(module, "AutoHTTPProtocol", lambda _: bounded(limits))


def trace_by_route(labels: RouteLabels, module: str = "opentelemetry.instrumentation.asgi") -> None:
    """Let spans of requests be called by their routes, without queries; see `labels`.

    Addresses of images are secrets. And without what there otherwise is for each part of a stream:
    a span of its own.
    """

    def plain(middleware: Callable[..., ASGIApp]) -> Callable[..., ASGIApp]:
        return labels.around(partial(middleware, exclude_spans=["receive", "send"]))

    _replace(module, "OpenTelemetryMiddleware", plain)


def share_tracer() -> None:
    """Let spans of ours go where BentoML's go. Call it once BentoML has read its configuration."""
    container = import_module("bentoml._internal.configuration.containers").BentoMLContainer
    spans.send_by(container.tracer_provider.get())


def format_logs(chosen: Formatter, module: str = "bentoml._internal.log") -> None:
    """Let BentoML, which may set up its log before or after this, write lines by `chosen`."""
    formatters = {"formatters": {"traced": {"()": lambda: chosen}}}
    _replace(module, "SERVER_LOGGING_CONFIG", lambda config: config | formatters)
    use_everywhere(chosen)


def _replace(module: str, name: str, replacement: Callable[[Any], Any]) -> None:
    try:
        part = import_module(module)
        setattr(part, name, replacement(getattr(part, name)))
    except (ImportError, AttributeError):
        package = module.partition(".")[0]
        log.warning("%s %s has no %s, which would be replaced", package, version(package), name)
