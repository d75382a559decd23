"""Virtual time: what is due happens in order, and no time passes in between."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count


class Clock:
    """Seconds since the start; calling it gives the time, as `time.monotonic` does."""

    def __init__(self) -> None:
        self._now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()  # what is due at the same time happens in the order it was asked for

    def __call__(self) -> float:
        return self._now

    def at(self, time: float, action: Callable[[], None]) -> None:
        heappush(self._due, (time, next(self._order), action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.at(self._now + seconds, action)

    def run(self) -> None:
        """Until nothing is due any more."""
        while self._due:
            self._now, _, action = heappop(self._due)
            action()
