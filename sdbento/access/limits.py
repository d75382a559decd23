"""The limits of single keys: requests a minute, images at once, and shares of what is full.

Counted in this process, on its event loop. Knows neither keys nor requests, only names and numbers.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sdbento.access.caller import Caller
from sdbento.errors import Forbidden, LimitReached

MINUTE = 60.0


class RequestRate:
    """How often each key was used in the last minute, at any moment: no more than its limit."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: dict[str, deque[float]] = {}

    def count(self, caller: Caller) -> None:
        """Count a request of `caller`. Raises LimitReached, and does not count it, when there were
        too many; `retry_after` is then when the oldest is a minute old."""
        limit = caller.allowance.requests_per_minute
        if limit is None or caller.name is None:
            return
        now = self._clock()
        times = self._times.setdefault(caller.name, deque())
        while times and times[0] <= now - MINUTE:
            times.popleft()
        if len(times) >= limit:
            raise LimitReached(
                f"this key may send {limit} requests a minute; try again later",
                retry_after=times[-limit] + MINUTE - now,
            )
        times.append(now)


class ImagesAtOnce:
    """How many images of each key are unfinished."""

    def __init__(self) -> None:
        self._images: Counter[str] = Counter()

    @contextmanager
    def hold(self, caller: Caller, num_images: int, retry_after: float) -> Iterator[None]:
        """Count images in and, at the end, out. Raises LimitReached while there are too many,
        Forbidden if there can never be so many."""
        limit, name = caller.allowance.images_at_once, caller.name
        if limit is None or name is None:
            yield
            return
        if num_images > limit:
            raise Forbidden(
                f"this key may have {limit} images at once; given: {num_images}",
                param="num_images",
            )
        if self._images[name] + num_images > limit:
            raise LimitReached(
                f"{self._images[name]} images of this key are unfinished, it may have {limit} at "
                "once; try again later",
                retry_after=retry_after,
            )
        self._images[name] += num_images
        try:
            yield
        finally:
            self._images[name] -= num_images
            if not self._images[name]:
                del self._images[name]


def has_share(own: int, total: int, limit: int, more: int = 1) -> bool:
    """Whether a key that has `own` of the `total` places taken may take `more` of `limit`.

    It is refused once it has as many as are free: a single key gets half, of three that want all
    each gets a quarter, and one who comes later always finds room (dynamic thresholds; Choudhury
    and Hahne 1998). For keys that share the places with others; one alone may have them all.
    """
    return own + more <= limit - total


def share_taken(what: str, retry_after: float | None = None) -> LimitReached:
    """The error for a key that has its share of `what` already."""
    return LimitReached(
        f"this key has its share of {what}; the places that are left are for others; try again "
        "later",
        retry_after=retry_after,
    )
