"""`sdbento.runner.calibration`: what is measured in idle time, and what is not started."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from sdbento.engine.cost import CostModel
from sdbento.engine.trajectory import BatchKey, Stage
from sdbento.errors import OutOfMemory
from sdbento.runner.calibration import BUDGET, LONGEST, Calibration
from tests.support.oracle import tiny_model

SPEC = tiny_model("sd15").spec
KEY = BatchKey(SPEC.name, SPEC.height // 8, SPEC.width // 8)


class Bench:
    """A calibration whose calls take `seconds(rows, number of the call)`."""

    def __init__(
        self,
        seconds: Callable[[int, int], float],
        max_rows: int = 8,
        seconds_by_side: Callable[[int], float] | None = None,
        side: int = SPEC.width,
    ) -> None:
        self.now = 0.0
        self.spec = replace(SPEC, width=side, height=side)
        self.key = BatchKey(SPEC.name, side // 8, side // 8)
        self.sides: list[int] = []  # of the calls with one row at smaller sizes
        self.decoded: list[int] = []  # sides of the decodes at smaller sizes
        self._seconds_by_side = seconds_by_side
        self.calls: list[int] = []  # rows; 0: a decode
        self.leases = 0
        self.resident = True
        self.cost = CostModel(clock=lambda: self.now)
        self._seconds = seconds
        runner: Any = self
        self.calibration = Calibration(
            self.spec, runner, runner, self.cost, max_rows, clock=lambda: self.now
        )

    def lease_if_resident(self, spec: Any) -> Any:
        assert spec is self.spec
        self.leases += 1
        return nullcontext("the pipeline") if self.resident else None

    def measure(self, pipeline: Any, key: BatchKey, rows: int, *, capture: bool = False) -> float:
        assert pipeline == "the pipeline"
        if key != self.key:
            return self._measure_smaller(key, rows)
        self.calls.append(rows)
        seconds = self._seconds(rows, len(self.calls))
        self.now += seconds
        return seconds

    def _measure_smaller(self, key: BatchKey, rows: int) -> float:
        assert self._seconds_by_side is not None
        assert key.latent_height == key.latent_width
        side = 8 * key.latent_width
        self.sides += [side] if rows else []
        self.decoded += [] if rows else [side]
        seconds = self._seconds_by_side(side)
        self.now += seconds
        return seconds

    def measure_decode(self, pipeline: Any, key: BatchKey) -> float:
        return self.measure(pipeline, key, 0)

    def run(self) -> list[int]:
        for done, _ in enumerate(self.calibration.measurements(), start=1):
            num_calls = len(self.calls) + len(self.sides) + len(self.decoded)
            assert num_calls == done, "a request must never wait for more than one call"
        return self.calls

    def step(self, rows: int) -> float:
        return self.cost.seconds(KEY, Stage.STEP, rows)


def test_powers_of_two_and_a_decode_are_timed_and_every_other_row_count_is_warmed_up() -> None:
    bench = Bench(lambda rows, _: (10 + rows) / 1000)
    assert bench.run() == [*[1] * 4, *[2] * 4, *[4] * 4, *[8] * 4, *[0] * 4, *range(8, 0, -1)]
    assert [bench.step(rows) for rows in (1, 2, 4, 8)] == [0.011, 0.012, 0.014, 0.018]
    assert bench.cost.seconds(KEY, Stage.DECODE, 1) == 0.01


def test_one_time_work_for_a_row_count_is_not_learned() -> None:
    seen: set[int] = set()

    def seconds(rows: int, _: int) -> float:
        first = rows not in seen
        seen.add(rows)
        return 0.4 if first else 0.01

    bench = Bench(seconds)
    bench.run()
    assert {bench.step(rows) for rows in range(1, 9)} == {0.01}


def test_a_large_model_on_a_slow_device_is_measured_at_small_sizes_only() -> None:
    bench = Bench(lambda *_: 60.0, seconds_by_side=lambda side: side**2 / 1e5, side=1024)
    assert bench.run() == []
    assert bench.sides == bench.decoded == [64, 64, 128, 128]
    assert bench.cost.seconds(bench.key, Stage.STEP, 1) == pytest.approx(1024**2 / 1e5)


def test_a_large_model_on_a_fast_device_is_measured_at_its_own_size() -> None:
    bench = Bench(lambda *_: 0.05, seconds_by_side=lambda _: 0.04, side=1024)
    assert bench.run()[:8] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert bench.sides == bench.decoded == [64, 64, 128, 128, 256, 256, 512, 512]


def test_a_slow_device_makes_one_call_only() -> None:
    bench = Bench(lambda *_: 15.0)
    assert bench.run() == [1]
    assert bench.step(1) < 1.0  # still the guess


def test_no_call_begins_that_would_make_a_request_wait() -> None:
    bench = Bench(lambda rows, _: 0.2 * max(rows, 0.1))
    assert set(bench.run()) == {0, 1, 2}
    bench = Bench(lambda *_: LONGEST + 0.1)
    assert bench.run()[:2] == [1, 1]
    assert bench.calls.count(1) == 2


def test_calibration_ends_when_its_time_is_up() -> None:
    bench = Bench(lambda *_: 0.2, max_rows=32)
    bench.run()
    assert BUDGET - LONGEST <= bench.now <= BUDGET


@pytest.mark.parametrize("pause", [15.0, 0.0])
@pytest.mark.parametrize("at", range(1, 28))
def test_a_pause_at_any_moment_is_not_believed(at: int, pause: float) -> None:
    bench = Bench(lambda rows, call: pause if call == at else (10 + rows) / 1000)
    bench.run()
    assert bench.cost.lower_bound(KEY, Stage.STEP, 8) <= 0.018
    assert bench.cost.lower_bound(KEY, Stage.DECODE, 1) <= 0.01
    bench.cost.observe(KEY, Stage.STEP, 1, 0.011)  # the first request
    assert all(bench.step(rows) < 0.2 for rows in (1, 2, 4, 8))


def test_calibration_ends_when_the_model_is_evicted() -> None:
    bench = Bench(lambda *_: 0.01)
    calls = bench.calibration.measurements()
    next(calls)
    bench.resident = False
    assert list(calls) == []
    assert bench.calls == [1]


def test_calibration_ends_though_the_clock_stands_still_or_jumps() -> None:
    bench = Bench(lambda *_: 0.0)
    assert len(bench.run()) == 28
    jumps = itertools.cycle([1e9, -1e9])
    bench = Bench(lambda *_: next(jumps))
    assert len(bench.run()) <= 28


def test_out_of_memory_is_raised_to_the_caller() -> None:
    def seconds(rows: int, _: int) -> float:
        if rows > 2:
            raise OutOfMemory("too many rows")
        return 0.01

    bench = Bench(seconds)
    with pytest.raises(OutOfMemory):
        bench.run()
    assert bench.step(2) == 0.01
