"""`sdbento.engine.watchdog`: calls that hang are told apart from those that are slow."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from sdbento.engine import watchdog
from sdbento.engine.watchdog import Watchdog

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


def test_many_short_calls_are_not_one_long_call(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def work(dog: Watchdog) -> None:
        for _ in range(40):
            with dog.watching("a step", 0.05):
                stop.wait(0.01)
        stop.wait(SOON)  # in no call at all

    watched = Watched(monkeypatch, work)
    assert not watched.failed.wait(0.8)
    watched.watchdog.stop()
    stop.set()


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


def test_what_runs_within_a_call_does_not_count_as_its_own_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = threading.Event()

    def work(dog: Watchdog) -> None:
        with dog.watching("the long step", 0.05):
            for _ in range(20):
                with dog.watching("a short step", SOON):
                    stop.wait(0.03)
                stop.wait(0.001)
        stop.wait(SOON)  # in no call at all

    watched = Watched(monkeypatch, work)
    assert not watched.failed.wait(1.0)
    watched.watchdog.stop()
    stop.set()


def test_a_dead_thread_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, lambda _: None)
    assert watched.failed.wait(SOON)
    assert watched.failures == ["the thread engine has died"]
