"""Where traces go, as BentoML's configuration has it.

BentoML makes the span of each request, and sends it with those below it. A configuration file of
BentoML's own (BENTOML_CONFIG) wins over what is said here.
"""

from __future__ import annotations

from typing import Any

from sdbento.doors.observability.request_log import PROBES
from sdbento.environment import load_settings
from sdbento.settings import SettingsError


def tracing() -> dict[str, Any]:
    """The argument `tracing` of the service. Where a setting is bad, the service says so later."""
    excluded = {"excluded_urls": [f"{path}$" for path in PROBES]}
    try:
        settings = load_settings()
    except SettingsError:
        return excluded
    if settings.otlp_endpoint is None:
        return excluded
    return excluded | {
        "exporter_type": "otlp",
        "sample_rate": settings.trace_rate,
        "otlp": {"protocol": "http", "endpoint": settings.otlp_endpoint},
    }
