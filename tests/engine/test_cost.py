from __future__ import annotations

from dataclasses import replace

import pytest

from sdbento.engine.cost import ENOUGH, FRESH, MAX_CURVES, CostModel, Curve
from sdbento.engine.trajectory import BatchKey, Stage

SMALL, LARGE = BatchKey("m", 16, 16), BatchKey("m", 32, 32)


def learned(key: BatchKey = SMALL, **seconds: float) -> CostModel:
    cost = CostModel()
    for rows, value in seconds.items():
        warm_up(cost, key, int(rows.removeprefix("r")))
        cost.observe(key, Stage.STEP, int(rows.removeprefix("r")), value)
    return cost


def warm_up(cost: CostModel, key: BatchKey, rows: int) -> None:
    """The first call of a size, which is not learned."""
    cost.observe(key, Stage.STEP, rows, 1e3)


@pytest.mark.parametrize(
    "other", [(SMALL, Stage.STEP, 4), (SMALL, Stage.DECODE, 2), (LARGE, Stage.STEP, 2)]
)
def test_the_first_timing_of_each_kind_and_size_is_not_learned(
    other: tuple[BatchKey, Stage, int],
) -> None:
    cost = CostModel()
    guess = cost.seconds(SMALL, Stage.STEP, 2)
    cost.observe(SMALL, Stage.STEP, 2, 60.0)
    assert cost.seconds(SMALL, Stage.STEP, 2) == guess
    cost.observe(SMALL, Stage.STEP, 2, 1.0)
    assert cost.seconds(SMALL, Stage.STEP, 2) == 1.0
    before = cost.seconds(*other)
    cost.observe(*other, 60.0)
    assert cost.seconds(*other) == before
    cost.observe(*other, 3.0)
    assert cost.seconds(*other) == 3.0


def test_a_curve_without_measurements_predicts_nothing() -> None:
    assert Curve().predict(4) is None


def test_predictions_are_exact_at_measured_counts_and_linear_between_them() -> None:
    curve = Curve()
    curve.observe(2, 1.0)
    curve.observe(4, 2.0)
    assert [curve.predict(rows) for rows in (2, 3, 4)] == [1.0, 1.5, 2.0]


def test_beyond_the_measured_counts_batching_is_assumed_to_pay() -> None:
    curve = Curve()
    curve.observe(2, 1.0)
    assert 1.0 < (curve.predict(8) or 0) < 4.0
    assert curve.predict(1) == 1.0


def test_a_prediction_follows_the_measurements_but_no_single_outlier() -> None:
    curve = Curve()
    curve.observe(2, 1.0)
    curve.observe(2, 1000.0)
    assert (curve.predict(2) or 0) < 1.2
    for _ in range(100):
        curve.observe(2, 2.0)
    assert curve.predict(2) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("wrong", [0.0, 1e-9, 15.0, 1e6])
@pytest.mark.parametrize("at", range(5))
def test_one_wrong_timing_of_any_kind_at_any_moment_is_not_believed(wrong: float, at: int) -> None:
    curve = Curve()
    for i in range(5):
        curve.observe(2, wrong if i == at else 1.0)
        if i >= 2:
            assert curve.predict(2) == 1.0
        curve.observe(4, 1.5)
    assert curve.predict(4) == 1.5


def test_the_first_calls_of_a_row_count_are_ignored_because_they_include_one_time_work() -> None:
    curve = Curve()
    for _ in range(3):
        curve.observe(2, 1.0)
        curve.observe(4, 1.6)
    curve.observe(3, 60.0)
    assert curve.predict(3) == pytest.approx(1.3)
    curve.observe(8, 60.0)
    assert (curve.predict(8) or 0) < 3.2


def test_a_row_count_never_costs_more_than_a_larger_one() -> None:
    curve = Curve()
    for _ in range(3):
        curve.observe(3, 9.0)
        curve.observe(4, 2.0)
    assert curve.predict(3) == 2.0


def test_a_size_whose_only_timing_may_be_wrong_still_borrows() -> None:
    cost = learned(r2=1.5)
    for _ in range(2):
        cost.observe(SMALL, Stage.STEP, 2, 1.5)
    warm_up(cost, LARGE, 2)
    cost.observe(LARGE, Stage.STEP, 2, 1000.0)
    assert cost.seconds(LARGE, Stage.STEP, 2) == pytest.approx(1.5 * 4)
    for _ in range(2):
        cost.observe(LARGE, Stage.STEP, 2, 7.0)
    assert cost.seconds(LARGE, Stage.STEP, 2) == 7.0


def test_few_timings_larger_batches_and_old_timings_prove_nothing() -> None:
    now = 0.0
    cost = CostModel(clock=lambda: now)
    warm_up(cost, SMALL, 2)
    for _ in range(2):
        cost.observe(SMALL, Stage.STEP, 2, 1.0)
        assert cost.lower_bound(SMALL, Stage.STEP, 2) == 0.0
    cost.observe(SMALL, Stage.STEP, 2, 5.0)
    assert cost.lower_bound(SMALL, Stage.STEP, 1) == 0.0
    assert cost.lower_bound(SMALL, Stage.STEP, 2) == 1.0
    assert cost.lower_bound(SMALL, Stage.STEP, 8) == 1.0
    assert cost.lower_bound(LARGE, Stage.STEP, 2) == 0.0
    now = FRESH + 1
    assert cost.lower_bound(SMALL, Stage.STEP, 2) == 0.0


def test_before_anything_is_measured_large_batches_are_tried() -> None:
    assert CostModel().knee(SMALL, 8) == 8


def test_large_batches_are_tried_for_a_key_that_has_no_measurements_of_them() -> None:
    assert learned(r1=1.0).knee(SMALL, 8) == 8


def test_the_knee_is_where_more_rows_stop_paying() -> None:
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


def test_shallow_steps_borrow_from_whole_ones_and_never_the_other_way_round() -> None:
    shallow, large_shallow = replace(SMALL, shallow=True), replace(LARGE, shallow=True)
    cost = learned(r1=1.0)
    assert cost.seconds(shallow, Stage.STEP, 1) == 1.0
    for _ in range(3):
        cost.observe(shallow, Stage.STEP, 1, 0.2)
    assert cost.seconds(SMALL, Stage.STEP, 1) == 1.0
    assert cost.seconds(LARGE, Stage.STEP, 1) == pytest.approx(4 * 1.0)
    assert cost.seconds(large_shallow, Stage.STEP, 1) == pytest.approx(4 * 0.2)


def test_a_new_measurement_moves_the_knee() -> None:
    cost = learned(r1=1.0, r2=2.0)
    assert cost.knee(SMALL, 2) == 1
    for _ in range(30):
        cost.observe(SMALL, Stage.STEP, 2, 1.0)
    assert cost.knee(SMALL, 2) == 2


def test_where_steps_are_padded_a_batch_is_filled_to_the_rows_that_are_computed() -> None:
    cost = CostModel(computed_rows=lambda rows: -(-rows // 4) * 4)
    for _ in range(1 + ENOUGH):
        cost.observe(SMALL, Stage.STEP, 3, 4.0)
        cost.observe(SMALL, Stage.STEP, 6, 9.0)
        cost.observe(SMALL, Stage.DECODE, 3, 1.0)
    assert [cost.seconds(SMALL, Stage.STEP, rows) for rows in range(1, 9)] == [4.0] * 4 + [9.0] * 4
    assert cost.knee(SMALL, 8) == 4
    assert cost.lower_bound(SMALL, Stage.STEP, 5) == 9.0
    assert cost.seconds(SMALL, Stage.DECODE, 3) == 1.0


def test_of_sizes_without_end_the_latest_are_remembered() -> None:
    cost = learned(SMALL, r1=1.0, r2=1.5)
    often = replace(SMALL, token_merging_ratio=0.5)
    for width in range(MAX_CURVES + 10):
        for key in (replace(SMALL, latent_width=17 + width), often):
            warm_up(cost, key, 1)
            for _ in range(ENOUGH):
                cost.observe(key, Stage.STEP, 1, 0.5)
            assert cost.seconds(key, Stage.STEP, 1) > 0
    assert len(cost._curves) <= MAX_CURVES and len(cost._called) <= MAX_CURVES
    assert cost.is_timed(often, Stage.STEP) and not cost.is_timed(SMALL, Stage.STEP)


def test_the_first_call_of_a_size_is_known_to_be_one() -> None:
    """It may capture a graph, or compile, and take minutes: it does not hang."""
    cost = learned(SMALL, r1=1.0)
    for _ in range(ENOUGH):
        cost.observe(SMALL, Stage.STEP, 1, 1.0)
    assert cost.is_timed(SMALL, Stage.STEP)
    assert cost.was_called(SMALL, Stage.STEP, 1) and not cost.was_called(SMALL, Stage.STEP, 2)
    cost.observe(SMALL, Stage.STEP, 2, 60.0)
    assert cost.was_called(SMALL, Stage.STEP, 2)
