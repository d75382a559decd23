from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from sdbento.metrics.definitions import SIDES, size_of
from sdbento.metrics.instruments import OTHER, Counter, Gauge, Histogram, Label


def test_a_counter_counts_by_its_labels() -> None:
    counter = Counter("c", "", Label("kind", ("a", "b")))
    counter.add("a")
    counter.add("b", amount=2)
    counter.add("a")
    assert counter.copy() == {("a",): [2.0], ("b",): [2.0]}


def test_a_gauge_has_the_last_value_or_asks_for_it() -> None:
    gauge = Gauge("g", "", Label("kind", ("set", "asked")))
    gauge.set(3, "set")
    gauge.set(4, "set")
    gauge.follow(lambda: 5.0, "asked")
    assert gauge.copy() == {("set",): [4], ("asked",): [5.0]}


def test_a_histogram_counts_what_is_at_most_each_bound() -> None:
    histogram = Histogram("h", "", bounds=(1, 10))
    for value in (0.5, 1, 2, 10, 11):
        histogram.observe(value)
    assert histogram.copy() == {(): [2, 2, 1, 24.5]}


def test_what_has_no_room_in_a_label_is_counted_as_other() -> None:
    """However many models are asked for, /metrics has no more than MAX_MODELS."""
    counter = Counter("c", "", Label("model", ("known",), room=2))
    for i in range(1000):
        counter.add(f"m{i}")
    counter.add("known")
    expected = {("m0",): [1.0], ("m1",): [1.0], (OTHER,): [998.0], ("known",): [1.0]}
    assert counter.copy() == expected


def test_a_value_that_is_expected_takes_no_room() -> None:
    label = Label("route", room=1)
    label.expect("/a", "/b", "/a")
    assert [label.bounded(value) for value in ("/a", "/c", "/d")] == ["/a", "/c", OTHER]


def test_every_series_of_a_counter_is_shown_from_the_start() -> None:
    counter = Counter("c", "", Label("kind", ("a", "b")), Label("outcome", ("ok", "failed")))
    assert len([*counter.expected()]) == 4


def test_labels_that_are_forgotten_are_noticed() -> None:
    with pytest.raises(ValueError, match="zip"):
        Counter("c", "", Label("kind", ("a",))).add()


def test_nothing_is_lost_where_threads_count_at_once() -> None:
    counter, histogram = Counter("c", ""), Histogram("h", "", bounds=(1,))

    def count() -> None:
        for _ in range(5000):
            counter.add()
            histogram.observe(0.5)

    with ThreadPoolExecutor(8) as threads:
        for _ in range(8):
            threads.submit(count)
    assert counter.copy() == {(): [40_000]}
    assert histogram.copy() == {(): [40_000, 0, 20_000]}


def test_a_size_is_the_square_that_holds_the_image() -> None:
    assert [size_of(side**2) for side in SIDES] == [*map(str, SIDES)]
    assert size_of(64 * 64) == "256"
    assert size_of(512 * 768) == "768"
    assert size_of(2048 * 2049) == "larger"
