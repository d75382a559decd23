"""Parts of BentoML (1.4) that cannot be turned off, and are replaced before it makes the server.

They are private: where another version has none by that name, the server serves with whatever that
version does, and says so in its log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

from sdbento.doors.bentoml.labels import RouteLabels

log = logging.getLogger(__name__)

HTTP = "bentoml._internal.server.http"


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


def _replace(module: str, name: str, replacement: Callable[[Any], Any]) -> None:
    try:
        part = import_module(module)
        setattr(part, name, replacement(getattr(part, name)))
    except (ImportError, AttributeError):
        log.warning("BentoML %s has no %s, which would be replaced", version("bentoml"), name)
