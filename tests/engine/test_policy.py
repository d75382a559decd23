from __future__ import annotations

from collections.abc import Callable

import pytest

from sdbento.engine.policy import PATIENCE, num_together, turn


def flat(_: int) -> float:
    return 1.0


def linear(rows: int) -> float:
    return float(rows)


def chosen(num_images: int, seconds: Callable[[int], float], *, others: int = 0) -> int:
    """How many of so many guided images share the next call, which may take eight."""
    full = min(range(1, 17), key=lambda rows: seconds(rows) / rows)
    return num_together([2] * num_images, min(num_images, 8), others, seconds, full)


def test_images_go_in_order_of_arrival_but_a_much_shorter_one_passes_for_a_while() -> None:
    assert turn(0.0, 10.0) < turn(1.0, 10.0)
    just_in_time, too_late = PATIENCE * 9.0 - 0.01, PATIENCE * 9.0 + 0.01
    assert turn(just_in_time, 1.0) < turn(0.0, 10.0) < turn(too_late, 1.0)


def test_where_rows_cost_nothing_all_go_together() -> None:
    assert [chosen(n, flat) for n in (1, 2, 5, 8, 20)] == [1, 2, 5, 8, 8]


@pytest.mark.parametrize("num_images", [1, 2, 8, 100])
@pytest.mark.parametrize("others", [0, 50])
def test_where_batches_save_nothing_one_image_goes_at_a_time(num_images: int, others: int) -> None:
    assert chosen(num_images, linear, others=others) == 1


def gains_little(rows: int) -> float:
    return 7.0 + 12.0 * rows


def test_where_batches_save_little_they_form_only_when_many_wait() -> None:
    assert chosen(2, gains_little) == 1
    assert 1 < chosen(8, gains_little) < 8
    assert chosen(100, gains_little) == 8
    assert chosen(8, gains_little, others=100) == 8


@pytest.mark.parametrize("num_images", [9, 20, 100])
def test_a_padded_call_is_filled_to_the_rows_that_are_computed(num_images: int) -> None:
    edges = (2, 4, 6, 8, 12, 16)

    def padded(rows: int) -> float:
        return gains_little(next(edge for edge in edges if edge >= rows))

    assert 2 * chosen(num_images, padded) in edges


def test_one_row_more_that_is_computed_anyway_is_taken() -> None:
    def padded(rows: int) -> float:
        return gains_little(4) if rows <= 4 else gains_little(16)

    assert num_together([2, 1, 1, 2], 4, 0, padded, 16) == 3
