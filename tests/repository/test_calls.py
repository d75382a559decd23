"""`bench.calls`: calls are recorded as they are made, and judged by one curve fitted to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.calls import Call, CallLog, Curve, overhead, record
from sdbento.engine.planner import Planner
from sdbento.engine.trajectory import Stage
from tests.support.fakes import FakeRunner, make_trajectory


def step(rows: int, seconds: float, began: float = 0.0, key: str = "m 8x8 1") -> Call:
    return Call("step", key, 64, rows, began, seconds)


def test_packing_is_what_the_best_calls_would_have_taken() -> None:
    often = [step(2, 2.0), step(2, 2.0), step(2, 2.0), step(4, 2.0), step(4, 2.0), step(4, 2.0)]
    curve = Curve(often)
    assert curve.packing(often) == (6 + 12) * 0.5 / 12.0
    assert curve.packing([step(4, 99.0)]) == 1.0  # by the curve, not by the call's own timing
    assert curve.packing([step(2, 99.0), Call("decode", "m 8x8 1", 64, 1, 0.0, 9.0)]) == 0.5


def test_a_row_count_that_was_hardly_timed_is_not_the_best() -> None:
    calls = [step(2, 2.0), step(2, 2.0), step(2, 2.0), step(8, 0.1)]
    assert Curve(calls).packing([step(2, 2.0)]) == 1.0


def test_each_key_has_a_curve_of_its_own() -> None:
    calls = [step(2, seconds, key=key) for key, seconds in (("a", 1.0), ("b", 5.0))] * 3
    assert Curve(calls).packing(calls) == 1.0


def test_overhead_is_the_time_between_calls_of_a_round() -> None:
    first = [step(2, 1.0, began=10.0), step(2, 2.0, began=12.0)]
    second = [step(2, 4.0, began=100.0), step(2, 1.0, began=104.0)]
    assert overhead([first, second]) == pytest.approx(1.0 / 9.0)


def test_every_plan_is_noted_with_its_rows_and_its_seconds(tmp_path: Path) -> None:
    log, runner, planner = CallLog(tmp_path / "calls"), FakeRunner(), Planner(4)
    assert log.new() == []
    record(runner, log.add)
    planner.add([make_trajectory(2, rows=2), make_trajectory(2, rows=1)])
    while (plan := planner.plan()) is not None:
        launched = runner.launch(plan)
        planner.advance(plan)
        planner.record(plan, launched.wait(), 0.0)
    calls = log.new()
    assert sum(call.rows for call in calls if call.stage == Stage.DECODE) == 2
    assert sum(call.rows for call in calls if call.stage == Stage.STEP) == 6
    assert {(call.key, call.side, call.seconds) for call in calls} == {("a 8x8 1", 64, 0.001)}
    assert log.new() == []
