"""Pauses between attempts."""

from __future__ import annotations

from sdbento.backoff import Backoff


def test_pauses_double_up_to_a_bound() -> None:
    backoff = Backoff(first=0.5, longest=3.0)
    assert [backoff.next_pause() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_a_success_resets_the_pause() -> None:
    backoff = Backoff(first=0.5, longest=3.0)
    for _ in range(3):
        backoff.next_pause()
    backoff.reset()
    assert [backoff.next_pause() for _ in range(2)] == [0.5, 1.0]


def test_no_pause_is_longer_than_the_bound() -> None:
    assert Backoff(first=5.0, longest=1.0).next_pause() == 1.0
