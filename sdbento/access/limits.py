"""The limits of single keys, and the shares of callers in whatever has a limit for all.

Counted in this process, on its event loop. Knows neither keys nor requests, only names and numbers.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from sdbento.access.caller import Caller
from sdbento.errors import Forbidden, LimitReached, Overloaded

MINUTE = 60.0
RESERVE_PART = 8  # of what is free of a reserve, nobody takes more than an eighth, or one place


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
    def hold(
        self, caller: Caller, num_images: int, retry_after: Callable[[int], float]
    ) -> Iterator[None]:
        """Count images in and, at the end, out. Raises LimitReached while there are too many,
        Forbidden if there can never be so many.

        `retry_after`: the seconds until so many of the caller's images will have ended.
        """
        limit, name = caller.allowance.images_at_once, caller.name
        if limit is None or name is None:
            yield
            return
        if num_images > limit:
            raise Forbidden(
                f"this key may have {limit} images at once; given: {num_images}",
                param="num_images",
            )
        if (excess := self._images[name] + num_images - limit) > 0:
            raise LimitReached(
                f"{self._images[name]} images of this key are unfinished, it may have {limit} at "
                "once; try again later",
                retry_after=retry_after(excess),
            )
        self._images[name] += num_images
        try:
            yield
        finally:
            self._images[name] -= num_images
            if not self._images[name]:
                del self._images[name]


class Places:
    """How many places each owner has taken, of `limit`. `what` and `full` are for `refusal`; in
    `full` {} stands for the number of all that are taken."""

    def __init__(self, limit: int, what: str = "", full: str = "") -> None:
        self.limit = limit
        self.taken: Counter[str | None] = Counter()
        self._what = what
        self._full = full

    @property
    def total(self) -> int:
        return self.taken.total()

    def change(self, owner: str | None, number: int) -> None:
        """So many more are taken, or fewer."""
        self.taken[owner] += number
        if not self.taken[owner]:  # whoever has none is nobody to share with
            del self.taken[owner]

    def has_room(self, caller: Caller, more: int = 1) -> bool:
        return has_place(caller, self.taken, self.limit, more)

    def refusal(self, caller: Caller) -> Overloaded:
        return refusal(caller, self.taken, self.limit, self._what, self._full.format(self.total))


def has_place(caller: Caller, taken: Mapping[str | None, int], limit: int, more: int = 1) -> bool:
    """Whether `caller` may take `more` places beside those that each owner has `taken`.

    Where several keys share the `limit`, each leaves a part of it to the others. Without keys a
    client that is alone may fill it. Beside others it may only have an equal part, or as many as
    are free; and when the limit is reached, newcomers have a reserve, of which each gets little.
    """
    own, total = taken.get(caller.owner, 0), sum(taken.values())
    if caller.shares:
        return has_share(own, total, limit, more)
    has_part = caller.name is None and caller.address is not None
    if total + more <= limit:
        alone = own == total or not has_part
        equal = own * len({*taken, caller.owner}) < limit
        return alone or equal or has_share(own, total, limit, more)
    free = with_reserve(limit) - total
    return has_part and more <= free and (own == 0 or RESERVE_PART * (own + more) <= free)


def with_reserve(limit: int) -> int:
    """The places that there are for clients without keys where `limit` are for whoever comes."""
    return limit + (limit + 1) // 2


def has_share(own: int, total: int, limit: int, more: int = 1) -> bool:
    """Whether an owner who has `own` of the `total` places taken may take `more` of `limit`.

    He is refused once he has as many as are free: a single owner gets half, of three that want all
    each gets a quarter, and one who comes later always finds room (dynamic thresholds; Choudhury
    and Hahne 1998).
    """
    return own + more <= limit - total


def refusal(
    caller: Caller, taken: Mapping[str | None, int], limit: int, what: str, full: str
) -> Overloaded:
    """The error where there is no place: of a caller who has his share of `what`, or, in the words
    of `full`, of everybody."""
    total, own = sum(taken.values()), taken.get(caller.owner, 0)
    has_free_places = total < limit
    is_beside_others = own > 0 and len(taken) > 1
    if has_free_places if caller.shares else is_beside_others:
        return LimitReached(
            f"you have your share of {what}; the places that are left are for others; try again "
            "later"
        )
    return Overloaded(f"{full}; try again later")
