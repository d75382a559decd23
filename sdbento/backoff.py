"""How long to wait before something that failed is tried again. Knows nothing of what is tried."""

from __future__ import annotations


class Backoff:
    """Pauses in seconds that double with every failure, up to a bound.

    It does not wait itself, so that a thread, a task and whoever can be interrupted may use it:

        backoff = Backoff(first=0.1, longest=10.0)
        while not succeeded():
            await asyncio.sleep(backoff.next_pause())  # or event.wait(backoff.next_pause())
    """

    def __init__(self, first: float, longest: float) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    def next_pause(self) -> float:
        """The seconds to wait after one more failure."""
        pause = min(self._next, self._longest)
        self._next = 2 * pause
        return pause

    def reset(self) -> None:
        """Start again at the first pause. Call it after a success."""
        self._next = self._first
