from __future__ import annotations

from sdbento.metrics.definitions import MAX_MODELS, NONE, model, model_or_none, route
from sdbento.metrics.requests import (
    count_without_run,
    counting,
    current_request,
)
from tests.support.metrics import counted

ROUTE = "/a-route-of-tests"
route.expect(ROUTE)


def requests(outcome: str, model: str = NONE, route: str = ROUTE) -> str:
    return f"sdbento_requests_total{{model={model},outcome={outcome},route={route}}}"


def test_a_request_is_counted_once_with_its_model() -> None:
    before = counted()
    with counting(ROUTE) as request:
        current_request().note_model("a-model-of-tests")
        request.end("ok")
        request.end("failed")
        request.cancel("cancel")
    assert counted().since(before) == {
        requests("ok", "a-model-of-tests"): 1,
        "sdbento_request_seconds_count": 1,
    }


def test_why_a_request_was_cancelled_is_counted() -> None:
    before = counted()
    for reason in ("interrupt", None):
        with counting(ROUTE) as request:
            if reason is not None:
                request.cancel(reason)
            request.end("cancelled")
    count_without_run(ROUTE, "cancelled", "purge")
    count_without_run(ROUTE, "timeout")
    assert counted().since(before) == {
        requests("cancelled"): 3,
        requests("timeout"): 1,
        "sdbento_request_seconds_count": 2,
        "sdbento_cancelled_total{reason=interrupt}": 1,
        "sdbento_cancelled_total{reason=disconnect}": 1,
        "sdbento_cancelled_total{reason=purge}": 1,
    }


def test_what_was_handed_over_to_a_job_is_left_to_the_job() -> None:
    before = counted()
    with counting(ROUTE) as request:
        current_request().hand_over()
        request.end("ok")
    assert counted().since(before) == {}


def test_outside_of_a_request_nothing_is_counted() -> None:
    before = counted()
    current_request().end("ok")
    assert counted().since(before) == {}


def test_a_route_that_nobody_has_declared_cannot_make_series() -> None:
    before = counted()
    for i in range(100):
        with counting(f"/made-up-{i}") as request:
            request.end("ok")
    assert counted().since(before)[requests("ok", route="other")] == 100


def test_models_beyond_the_bound_are_counted_together() -> None:
    taken = model.values, model_or_none.values
    before = counted()
    try:
        for i in range(MAX_MODELS + 10):
            with counting(ROUTE) as request:
                request.note_model(f"m{i}")
                request.end("ok")
        grown = counted().since(before)
        assert grown[requests("ok", "other")] >= 10
        assert len(model_or_none.values) == MAX_MODELS + 1
    finally:
        model.values, model_or_none.values = taken
