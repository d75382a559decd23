"""A BentoML without the parts that are replaced is served as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sdbento.doors.bentoml.labels import RouteLabels
from sdbento.doors.bentoml.private import (
    bound_connections,
    count_by_route,
    format_logs,
    keep_addresses,
    keep_metrics_in_memory,
    leave_out_timeouts,
    trace_by_route,
)
from sdbento.doors.network.limits import Limits
from sdbento.telemetry.log_format import TextFormatter


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of importing BentoML
@pytest.mark.parametrize("module", ["sdbento.no_such_module", "bentoml.exceptions"])
@pytest.mark.parametrize(
    ("replace", "name"),
    [
        (leave_out_timeouts, "TimeoutMiddleware"),
        (keep_metrics_in_memory, "ValueClass"),
        (keep_addresses, "ProxyHeadersMiddleware"),
        (lambda module: bound_connections(Limits(), module), "AutoHTTPProtocol"),
        (lambda module: trace_by_route(RouteLabels([], []), module), "OpenTelemetryMiddleware"),
        (lambda module: format_logs(TextFormatter(), module), "SERVER_LOGGING_CONFIG"),
        (lambda module: count_by_route(RouteLabels([], []), module), "RunnerTrafficMetrics"),
    ],
)
def test_a_part_that_is_gone_is_told(
    replace: Callable[[str], None], name: str, module: str, caplog: pytest.LogCaptureFixture
) -> None:
    replace(module)
    assert f"has no {name}" in caplog.text
