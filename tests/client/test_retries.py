"""What is tried again, and after how long."""

from __future__ import annotations

import pytest

from sdbento.client.errors import NoAnswer, NotConnected, NotUnderstood
from sdbento.client.retries import JITTER, LONGEST_WAIT, Retries
from sdbento.errors import (
    DeadlineExceeded,
    InvalidParameter,
    ModelLoadFailed,
    OutOfMemory,
    Overloaded,
    SDBentoError,
    Unavailable,
)

REFUSED = [Overloaded("x"), Unavailable("x"), ModelLoadFailed("x"), NotConnected("x")]
PERHAPS_RUN = [NoAnswer("x")]
FINAL = [SDBentoError("x"), InvalidParameter("x"), OutOfMemory("x"), DeadlineExceeded("x")]
FINAL += [NotUnderstood("x")]


@pytest.mark.parametrize("error", REFUSED, ids=lambda e: e.type)
def test_what_was_refused_or_not_heard_is_sent_again(error: SDBentoError) -> None:
    assert Retries(1, harmless=False).pause_after(error)


@pytest.mark.parametrize("error", PERHAPS_RUN, ids=lambda e: e.type)
def test_what_may_have_been_run_is_sent_again_only_if_that_is_harmless(error: SDBentoError) -> None:
    assert Retries(1, harmless=False).pause_after(error) is None
    assert Retries(1, harmless=True).pause_after(error)


@pytest.mark.parametrize("error", FINAL, ids=lambda e: e.type)
def test_what_would_fail_again_is_not_sent_again(error: SDBentoError) -> None:
    assert Retries(1, harmless=True).pause_after(error) is None


def test_a_proxys_429_is_as_good_as_ours() -> None:
    error = SDBentoError("slow down")
    error.status = 429
    assert Retries(1, harmless=False).pause_after(error)


def test_there_are_as_many_retries_as_were_asked_for() -> None:
    retries = Retries(2, harmless=False)
    pauses = [retries.pause_after(Overloaded("x")) for _ in range(3)]
    assert pauses[0] and pauses[1] and pauses[1] > pauses[0] / (1 + JITTER)
    assert pauses[2] is None
    assert Retries(0, harmless=False).pause_after(Overloaded("x")) is None


def test_a_pause_is_as_long_as_the_server_says_and_a_little_longer() -> None:
    for _ in range(100):
        pause = Retries(1, harmless=False).pause_after(Overloaded("x", retry_after=20.0))
        assert pause is not None and 20.0 <= pause <= 20.0 * (1 + JITTER)


def test_nobody_is_kept_waiting_for_very_long() -> None:
    error = Overloaded("x", retry_after=LONGEST_WAIT + 1)
    assert Retries(1, harmless=False).pause_after(error) is None
