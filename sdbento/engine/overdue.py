"""Small requests that have waited out of proportion pass larger ones, for a fifth of the device.

A request that needs `need` seconds alone is overdue once it has waited for GRACE times as long. Of
those the smallest goes next, as long as calls that were led so have not taken more than a quarter
as long as those that went by the turns of the queue (`policy.turn`). So neither can keep the other
from its part of the device, however many there are of it and however old they are.

Each owner has such a balance of its own, since owners have shares of their own (`shares.py`). Knows
nothing of calls but their seconds.
"""

from __future__ import annotations

from collections.abc import Iterable

from sdbento.engine.trajectory import Owner

GRACE = 16.0  # times what a request needs alone: the wait after which it may pass larger ones
PRICE = 4.0  # seconds of calls by the turns of the queue, for each second of those that pass


def is_overdue(waited: float, need: float) -> bool:
    return waited > GRACE * need


class Balances:
    """For each owner, PRICE times the seconds that overdue requests led calls, less those of all
    other calls.

    A call by the turns of the queue leaves a claim for its own seconds, and no more: having had
    nobody to pass is saved by nobody. Used on the engine's thread only.
    """

    def __init__(self) -> None:
        self._seconds: dict[Owner, float] = {}

    def keep(self, owners: Iterable[Owner]) -> None:
        """Forget all other owners: they have nothing that waits."""
        self._seconds = {owner: self._seconds.get(owner, 0.0) for owner in owners}

    def may_pass(self, owner: Owner) -> bool:
        """Whether the next call that `owner` leads is for an overdue request, if there is one."""
        return self._seconds.get(owner, 0.0) <= 0

    def charge(self, owner: Owner, seconds: float, *, passed: bool) -> None:
        """A call that an image of `owner` led took so many seconds; `passed`: it was overdue."""
        before = self._seconds.get(owner, 0.0)
        after = before + PRICE * seconds if passed else max(before - seconds, -seconds)
        self._seconds[owner] = after
