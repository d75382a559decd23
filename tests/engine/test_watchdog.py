"""`sdbento.engine.watchdog`: calls that hang are told apart from those that are slow."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from sdbento.engine import watchdog
from sdbento.engine.watchdog import TICK, Watchdog

SOON = 5.0


class Watched:
    """A thread in one call after the other, and what its watchdog says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, work: Callable[[Watchdog], None]) -> None:
        monkeypatch.setattr(watchdog, "TICK", 0.01)
        self.failures: list[str] = []
        self.failed = threading.Event()
        self._work = work
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.watchdog = Watchdog(self.thread, self._note)
        self.thread.start()
        self.watchdog.start()

    def _run(self) -> None:
        self._work(self.watchdog)

    def _note(self, failure: str) -> None:
        self.failures.append(failure)
        self.failed.set()


def test_a_call_that_takes_too_long_is_reported_once_with_its_stack(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on = threading.Event()

    def hang_here(dog: Watchdog) -> None:
        with dog.watching("a step", 0.05):
            goes_on.wait(SOON)

    watched = Watched(monkeypatch, hang_here)
    assert watched.failed.wait(SOON)
    goes_on.set()
    watched.thread.join()
    assert watched.failures == ["a step hangs: it is not done after 0 s"]
    assert [line for line in caplog.text.splitlines() if line.endswith(", in hang_here")]


def looks(dog: Watchdog, num_ticks: int) -> list[str]:
    """What a watchdog that was not started says at so many looks."""
    return [failure for _ in range(num_ticks) if (failure := dog.look()) is not None]


def dog_of_this_thread() -> Watchdog:
    """Watches the thread of the test, which looks itself, so that no clock takes part."""
    return Watchdog(threading.current_thread(), lambda _: None)


def test_a_call_hangs_after_its_limit_and_not_before() -> None:
    dog = dog_of_this_thread()
    with dog.watching("a step", 3 * TICK):
        assert looks(dog, 4) == []  # the first look only learns of the call
        assert looks(dog, 1) == ["a step hangs: it is not done after 2 s"]


def test_many_short_calls_are_not_one_long_call() -> None:
    dog = dog_of_this_thread()
    for _ in range(40):
        with dog.watching("a step", 3 * TICK):
            assert looks(dog, 3) == []
    assert looks(dog, 40) == []  # in no call at all


@pytest.mark.parametrize("hangs_within", [True, False])
def test_a_call_within_another_and_the_rest_of_the_other_are_watched(
    hangs_within: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()

    def work(dog: Watchdog) -> None:
        with dog.watching("the long step", 0.05):
            with dog.watching("the short step", 0.05):
                if hangs_within:
                    goes_on.wait(SOON)
            goes_on.wait(SOON)

    watched = Watched(monkeypatch, work)
    assert watched.failed.wait(SOON)
    goes_on.set()
    watched.thread.join()
    name = "short" if hangs_within else "long"
    assert watched.failures == [f"the {name} step hangs: it is not done after 0 s"]


def test_what_runs_within_a_call_does_not_count_as_its_own_time() -> None:
    dog = dog_of_this_thread()
    with dog.watching("the long step", 3 * TICK):
        for _ in range(20):
            with dog.watching("a short step", 60.0):
                assert looks(dog, 10) == []
            assert looks(dog, 3) == []


def test_a_dead_thread_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, lambda _: None)
    assert watched.failed.wait(SOON)
    assert watched.failures == ["the thread engine has died"]
