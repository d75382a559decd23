"""Whose download is next, and which are stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from sdbento.access.caller import Caller, acting_for
from sdbento.catalog.downloads.process import HubProcess
from sdbento.catalog.downloads.queue import Downloads
from sdbento.errors import Cancelled, Unavailable

LIMIT = 20.0


class Slow:
    """Works that go on until they are let go, or their process is ended."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.stopped: list[str] = []
        self.go: dict[str, threading.Event] = {}

    def work(self, name: str) -> Callable[[HubProcess], str]:
        go = self.go.setdefault(name, threading.Event())

        def run(hub: HubProcess) -> str:
            self.begun.append(name)
            while not go.wait(0.005):
                if hub._ended:
                    self.stopped.append(name)
                    raise Cancelled("stopped")
            return f"result of {name}"

        return run


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def downloads() -> Iterator[Downloads]:
    downloads = Downloads(size=4)
    yield downloads
    downloads.close()


def want(downloads: Downloads, slow: Slow, name: str, owner: str | None = None) -> Future[Any]:
    with acting_for(Caller(owner)):
        return downloads.want(name, slow.work(name))


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.002)


def test_several_share_one_download(downloads: Downloads, slow: Slow) -> None:
    first, second = (want(downloads, slow, "a", owner) for owner in ("alice", "bob"))
    slow.go["a"].set()
    assert first.result(LIMIT) == second.result(LIMIT) == "result of a"
    assert slow.begun == ["a"]


def test_it_is_stopped_once_nobody_waits_for_it(downloads: Downloads, slow: Slow) -> None:
    first, second = (want(downloads, slow, "a") for _ in range(2))
    until(lambda: slow.begun == ["a"])
    first.cancel()
    time.sleep(0.05)
    assert slow.stopped == []
    second.cancel()
    until(lambda: slow.stopped == ["a"])
    slow.go["a"].set()
    assert want(downloads, slow, "a").result(LIMIT) == "result of a"


def test_who_wants_much_leaves_places_to_others(downloads: Downloads, slow: Slow) -> None:
    for i in range(5):
        want(downloads, slow, f"alice {i}", "alice")
    until(lambda: len(slow.begun) == 2)
    want(downloads, slow, "bob 0", "bob")
    want(downloads, slow, "carol 0", "carol")
    until(lambda: slow.begun == ["alice 0", "alice 1", "bob 0", "carol 0"])
    want(downloads, slow, "dave 0", "dave")
    slow.go["alice 0"].set()
    until(lambda: len(slow.begun) == 5)
    assert slow.begun[-1] == "dave 0", "who has no place goes before who has one"


def test_what_waits_and_is_not_wanted_any_more_never_begins(
    downloads: Downloads, slow: Slow
) -> None:
    futures = [want(downloads, slow, f"{i}") for i in range(4)]
    futures[3].cancel()
    for i in (0, 1, 2):
        slow.go[f"{i}"].set()
        futures[i].result(LIMIT)
    until(lambda: not downloads._running)
    assert slow.begun == ["0", "1", "2"]


def test_a_failure_is_that_of_all_who_wait_and_the_next_try_is_a_new_one(
    downloads: Downloads,
) -> None:
    outcomes = iter([OSError("the disk"), None])

    def work(_: HubProcess) -> str:
        if (error := next(outcomes)) is not None:
            raise error
        return "there"

    with pytest.raises(OSError, match="the disk"):
        downloads.want("a", work).result(LIMIT)
    assert downloads.want("a", work).result(LIMIT) == "there"


def test_closing_stops_all_and_tells_all(downloads: Downloads, slow: Slow) -> None:
    futures = [want(downloads, slow, f"{i}") for i in range(4)]
    until(lambda: len(slow.begun) == 2)
    downloads.close()
    for future in futures:
        with pytest.raises((Cancelled, Unavailable)):
            future.result(LIMIT)
    with pytest.raises(Unavailable):
        want(downloads, slow, "later").result(LIMIT)
