from __future__ import annotations

import pytest

from sdbento.cost import CostModel, Curve
from sdbento.trajectory import BatchKey, Stage

SMALL, LARGE = BatchKey("m", 16, 16), BatchKey("m", 32, 32)


def learned(key: BatchKey = SMALL, **seconds: float) -> CostModel:
    cost = CostModel()
    for rows, value in seconds.items():
        cost.observe(key, Stage.STEP, int(rows.removeprefix("r")), value)
    return cost


def test_a_curve_that_saw_nothing_predicts_nothing() -> None:
    assert Curve().predict(4) is None


def test_a_measured_count_is_predicted_as_measured_and_between_two_by_a_straight_line() -> None:
    curve = Curve()
    curve.observe(2, 1.0)
    curve.observe(4, 2.0)
    assert [curve.predict(rows) for rows in (2, 3, 4)] == [1.0, 1.5, 2.0]


def test_beyond_the_measured_counts_batching_is_hoped_to_pay() -> None:
    curve = Curve()
    curve.observe(2, 1.0)
    assert 1.0 < (curve.predict(8) or 0) < 4.0
    assert curve.predict(1) == 1.0


def test_a_running_mean_follows_the_measurements_but_no_single_outlier() -> None:
    curve = Curve()
    curve.observe(2, 1.0)
    curve.observe(2, 1000.0)
    assert (curve.predict(2) or 0) < 1.2
    for _ in range(100):
        curve.observe(2, 2.0)
    assert curve.predict(2) == pytest.approx(2.0, rel=0.01)


def test_a_key_without_measurements_of_large_batches_tries_them() -> None:
    assert learned(r1=1.0).knee(SMALL, 8) == 8


def test_the_knee_is_where_more_rows_stop_to_pay() -> None:
    cost = learned(r1=12.8, r2=17.7, r4=25.3, r8=37.1, r16=82.0)
    assert cost.knee(SMALL, 16) == 8
    assert cost.knee(SMALL, 4) == 4
    assert cost.seconds_per_row(SMALL, 16) == pytest.approx(37.1 / 8)


def test_a_device_that_one_row_fills_has_its_knee_at_one_row() -> None:
    assert learned(r1=1.0, r2=2.0, r4=4.0).knee(SMALL, 4) == 1


def test_a_size_that_never_ran_borrows_the_scaled_curve_of_its_model() -> None:
    cost = learned(r1=1.0, r2=1.5)
    assert cost.seconds(LARGE, Stage.STEP, 2) == pytest.approx(1.5 * 4)
    assert cost.seconds(BatchKey("other", 16, 16), Stage.STEP, 1) > 0


def test_a_new_measurement_moves_the_knee() -> None:
    cost = learned(r1=1.0, r2=2.0)
    assert cost.knee(SMALL, 2) == 1
    for _ in range(30):
        cost.observe(SMALL, Stage.STEP, 2, 1.0)
    assert cost.knee(SMALL, 2) == 2
