"""What engines have to do, from what they report and what they were given since."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from sdbento.backend.pool.estimates import LOAD_SECONDS, UNIT_SECONDS, Estimates
from sdbento.backend.pool.messages import Report
from sdbento.backend.pool.routed import RemoteHandle, RoutedRequest
from sdbento.backend.protocol import ResidentSpec
from sdbento.engine.forecast import Ending
from sdbento.settings import Settings
from tests.support.fake_loader import GB, spec

NOW = 1000.0


def routed(estimates: Estimates, number: int, model: str = "b", units: float = 10.0) -> Any:
    handle = RemoteHandle(number, lambda _: None, lambda _: None, lambda _: None)
    request: Any = None
    caller: Any = None
    needs = estimates.needs([spec(model)])
    made = RoutedRequest(request, caller, handle, needs, units, Future())
    made.placed = NOW
    return made


def report(*endings: Ending, models: tuple[str, ...] = (), is_ready: bool = True) -> Report:
    residents = tuple(ResidentSpec(spec(name), GB, "SDPA") for name in models)
    return Report(is_ready, endings, residents, 5 * GB)


@pytest.fixture
def estimates() -> Estimates:
    return Estimates(Settings(sd_model="a", device="cpu"))


def test_work_is_what_the_engine_expects_and_a_guess_for_what_it_has_not_seen(
    estimates: Estimates,
) -> None:
    requests = [routed(estimates, number) for number in (1, 2, 3)]
    seen = report(Ending(NOW + 8.0, None, 1, request=1), Ending(NOW + 90.0, None, 1, request=77))
    load = estimates.load_of(seen, requests, NOW, delay=2.0)
    assert load.seconds == pytest.approx(2.0 + 8.0 + 2 * 10.0 * UNIT_SECONDS)
    assert (load.num_requests, load.room) == (3, 5 * GB)
    estimates.learn_work(seen, requests, NOW)  # 8 seconds for 10 units
    load = estimates.load_of(seen, requests, NOW, delay=0.0)
    assert load.seconds == pytest.approx(8.0 + 2 * 8.0)


def test_what_a_request_waits_for_is_coming_and_the_default_comes_with_the_start(
    estimates: Estimates,
) -> None:
    requests = [routed(estimates, 1, "b")]
    estimates.needs([spec("a")])  # somebody has named the default model
    seconds = LOAD_SECONDS * (1 + spec("b").memory_gb)
    for has_started in (False, True):
        load = estimates.load_of(report() if has_started else None, requests, NOW + 0.5, 0.0)
        assert load.coming["b"] == pytest.approx(seconds - 0.5)
        assert ("a" in load.coming) is not has_started
    load = estimates.load_of(report(models=("b",)), requests, NOW, 0.0)
    assert load.resident == {"b"}
    assert not load.coming


def test_a_load_is_timed_by_the_request_that_caused_it(estimates: Estimates) -> None:
    first, second = routed(estimates, 1), routed(estimates, 2)
    first.loading = ["b"]
    estimates.learn_load(first, NOW + 7.0)
    estimates.learn_load(second, NOW + 50.0)  # it caused none
    (need,) = estimates.needs([spec("b")])
    assert need.load_seconds == 7.0
    assert need.nbytes == GB  # on a CPU, in fp32
