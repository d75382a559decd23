"""Who watches the batch: each gets the newest snapshot, and the next one after taking the last.

The batch is observed only while somebody watches. Watchers are few, and clients share their places
as they share the queue. For one event loop; knows nothing of what is in a snapshot.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from sdbento.access.caller import current_caller
from sdbento.access.limits import Places
from sdbento.errors import Unavailable, stopping
from sdbento.live.snapshot import Snapshot

MAX_WATCHERS = 16


class Source(Protocol):
    """Where the snapshots come from."""

    def check_usable(self) -> None:
        """Raises Unavailable where there is nothing to watch."""

    def observe(
        self, publish: Callable[[Snapshot], None], on_failure: Callable[[], None]
    ) -> Callable[[], None]:
        """Publish snapshots until what this returns is called; all on the event loop."""


class Watchers:
    """Those who watch `source`, until they leave or `close` sends them away."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._places = Places(
            MAX_WATCHERS, "the places to watch the batch", "{} clients watch the batch already"
        )
        self._newest: Snapshot | None = None
        self._news: set[asyncio.Event] = set()  # one a watcher, set when there is something new
        self._end_observation: Callable[[], None] | None = None
        self._closed, self._why_closed = False, stopping

    async def snapshots(self) -> AsyncGenerator[Snapshot, None]:
        """Snapshots for the present caller until `close`; those that come while he is busy with one
        are left out, but for the newest. Raises Overloaded where there is no place, Unavailable
        where no more can come."""
        self._source.check_usable()
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
        if self._end_observation is None:
            self._begin()
        try:
            yield news
        finally:
            self._news.remove(news)
            if not self._news:
                self._end()

    def _begin(self) -> None:
        self._end_observation = self._source.observe(self._take, lambda: self.close(_broken))

    def _end(self) -> None:
        assert self._end_observation is not None
        self._end_observation()
        self._end_observation = self._newest = None

    def _take(self, snapshot: Snapshot) -> None:
        self._newest = snapshot
        self._wake()

    def _wake(self) -> None:
        for news in self._news:
            news.set()


def _broken() -> Unavailable:
    return Unavailable("the batch cannot be watched any more; the server's log says why")
