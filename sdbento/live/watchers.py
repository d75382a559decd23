"""Who watches the batch: each gets the newest snapshot, and the next one after taking the last.

The engine is observed only while somebody watches. Watchers are few, and clients share their places
as they share the queue. For one event loop; knows nothing of what is in a snapshot.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress

from sdbento.access.caller import current_caller
from sdbento.access.limits import Places
from sdbento.background import start_task
from sdbento.engine.loop import Engine
from sdbento.errors import Unavailable, stopping
from sdbento.live.recorder import INTERVAL, Recorder
from sdbento.live.snapshot import Snapshot

MAX_WATCHERS = 16


class Watchers:
    """Those who watch `engine`, until they leave or `close` sends them away."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._places = Places(
            MAX_WATCHERS, "the places to watch the batch", "{} clients watch the batch already"
        )
        self._newest: Snapshot | None = None
        self._news: set[asyncio.Event] = set()  # one a watcher, set when there is something new
        self._refreshing: asyncio.Task[None] | None = None
        self._closed, self._why_closed = False, stopping

    async def snapshots(self) -> AsyncGenerator[Snapshot, None]:
        """Snapshots for the present caller until `close`; those that come while he is busy with one
        are left out, but for the newest. Raises Overloaded where there is no place, Unavailable
        where no more can come."""
        self._engine.check_usable()
        if self._closed:
            raise self._why_closed()
        with self._place(), self._watching() as news:
            while not self._closed:
                await news.wait()
                news.clear()
                if self._newest is not None and not self._closed:
                    yield self._newest

    def close(self, why: Callable[[], Unavailable] = stopping) -> None:
        """Send everybody away, as when the server stops, which an open stream would hold up. Who
        comes later gets the error that `why` makes."""
        self._closed, self._why_closed = True, why
        self._wake()

    @contextmanager
    def _place(self) -> Iterator[None]:
        caller = current_caller()
        if not self._places.has_room(caller):
            raise self._places.refusal(caller)
        self._places.change(caller.owner, 1)
        try:
            yield
        finally:
            self._places.change(caller.owner, -1)

    @contextmanager
    def _watching(self) -> Iterator[asyncio.Event]:
        news = asyncio.Event()
        if self._newest is not None:
            news.set()
        self._news.add(news)
        if self._refreshing is None:
            self._begin()
        try:
            yield news
        finally:
            self._news.remove(news)
            if not self._news:
                self._end()

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()

        def publish(snapshot: Snapshot) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._take, recorder, snapshot)

        recorder = Recorder(self._engine, publish)
        self._engine.observer = recorder
        self._refreshing = start_task(
            self._refresh(recorder), "sdbento live batch", lambda: self.close(_broken)
        )

    def _end(self) -> None:
        assert self._refreshing is not None
        self._refreshing.cancel()
        self._refreshing = self._newest = self._engine.observer = None

    def _take(self, recorder: Recorder, snapshot: Snapshot) -> None:
        if self._engine.observer is recorder:  # not one that is late, of watchers before
            self._newest = snapshot
            self._wake()

    def _wake(self) -> None:
        for news in self._news:
            news.set()

    async def _refresh(self, recorder: Recorder) -> None:
        """Have the snapshots made that no call causes: the first, the last before the engine goes
        idle, and one now and then while it is."""
        while self._engine.observer is recorder:
            refreshed = self._engine.call(recorder.refresh)
            while not refreshed.done() or not recorder.is_due:
                await asyncio.sleep(INTERVAL)
            refreshed.result()
        raise RuntimeError("the engine has dropped its observer, which failed")


def _broken() -> Unavailable:
    return Unavailable("the batch cannot be watched any more; the server's log says why")
