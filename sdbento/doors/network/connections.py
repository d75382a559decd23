"""All connections to one port: how many there may be, who has them, and which are overdue.

And how much of their answers may wait for clients to take it.

Knows nothing of HTTP: a connection says itself whether it can be spared, and what it waits for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Protocol

from sdbento.access.limits import has_share
from sdbento.doors.network.limits import Limits

log = logging.getLogger(__name__)


class Connection(Protocol):
    owner: str | None  # its client's address

    def spare(self) -> int | None:
        """How readily it can be closed, 0 being the first to go. None: it is being answered."""
        ...

    def untaken(self) -> int:
        """Bytes of answers that its client has not taken."""
        ...

    def drop(self) -> None:
        """Close it now, without a word."""
        ...

    def check(self, elapsed: float) -> None:
        """Act if it is overdue. `elapsed`: seconds since the last call."""
        ...


class Connections:
    """`admit` each connection and `remove` it when it is gone.

    Where an owner has his share, or there are too many, the oldest connection that waits for its
    client makes room for a new one, of whoever has the most: who sends his request at once is
    served even while all connections are held open.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._by_owner: dict[str | None, dict[Connection, None]] = {}
        self._refused: dict[Connection, None] = {}  # they are still told why
        self._count = 0
        self._sweeping = False
        self._swept = 0.0

    def admit(self, connection: Connection) -> bool:
        """Whether there is room for it, perhaps since another one was closed.

        One that is refused has to close itself; of those, too, there are only so many.
        """
        self._start_sweeping()
        if not self._has_room_for(connection.owner):
            self._refused[connection] = None
            if len(self._refused) > self._limits.refused_connections:
                oldest = next(iter(self._refused))
                self.remove(oldest)
                oldest.drop()
            return False
        self._by_owner.setdefault(connection.owner, {})[connection] = None
        self._count += 1
        return True

    def bound_untaken(self) -> None:
        """If clients leave more of their answers untaken than there may be, close the connection
        with the most, of whoever has the most of all, and so on until the rest is little enough."""
        untaken = {
            each: num_bytes
            for connections in self._by_owner.values()
            for each in connections
            if (num_bytes := each.untaken())
        }
        of_owners: Counter[str | None] = Counter()
        for each, num_bytes in untaken.items():
            of_owners[each.owner] += num_bytes
        while of_owners.total() > self._limits.untaken_bytes:
            [(owner, _)] = of_owners.most_common(1)
            largest = max((c for c in untaken if c.owner == owner), key=untaken.__getitem__)
            of_owners[owner] -= untaken.pop(largest)
            log.warning("%s takes its answers too slowly: one of them is given up", owner)
            self.remove(largest)
            largest.drop()

    def _has_room_for(self, owner: str | None) -> bool:
        own = self._by_owner.get(owner, {})
        if has_share(len(own), self._count, self._limits.connections):
            return True
        most = max(self._by_owner.values(), key=len)
        return self._make_room(most) or self._make_room(own)

    def remove(self, connection: Connection) -> None:
        self._refused.pop(connection, None)
        own = self._by_owner.get(connection.owner, {})
        if connection not in own:
            return
        del own[connection]
        self._count -= 1
        if not own:
            del self._by_owner[connection.owner]

    def _make_room(self, candidates: dict[Connection, None]) -> bool:
        ranked = [(rank, each) for each in candidates if (rank := each.spare()) is not None]
        if not ranked:
            return False
        _, first = min(ranked, key=lambda pair: pair[0])  # of equals the oldest
        self.remove(first)
        first.drop()
        return True

    def _start_sweeping(self) -> None:
        if not self._sweeping:
            self._sweeping = True
            loop = asyncio.get_running_loop()
            self._swept = loop.time()
            loop.call_later(self._limits.sweep_seconds, self._sweep)

    def _sweep(self) -> None:
        """One timer for all: one for each would have to be set anew for each piece of a body."""
        loop = asyncio.get_running_loop()
        before, self._swept = self._swept, loop.time()
        # If the loop itself was late, clients are not to blame: what they sent is still unread.
        elapsed = min(self._swept - before, 2 * self._limits.sweep_seconds)
        try:
            for connections in [self._refused, *self._by_owner.values()]:
                for connection in list(connections):
                    self._check(connection, elapsed)
            self.bound_untaken()
        finally:
            self._sweeping = bool(self._count or self._refused)
            if self._sweeping:
                loop.call_later(self._limits.sweep_seconds, self._sweep)

    def _check(self, connection: Connection, elapsed: float) -> None:
        """A fault in the check of one must not leave all others without an end."""
        try:
            connection.check(elapsed)
        except Exception:
            log.exception("a connection could not be checked, and is closed")
            self.remove(connection)
            connection.drop()
