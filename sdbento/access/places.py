"""Places that are waited for: in total, for each owner, and of an owner on each host.

Hosts may be slow on purpose, and one who names many of them may be as well. So an owner leaves room
for others, and of its own room a slow host gets a part only. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from threading import Lock

from sdbento.access.caller import Caller
from sdbento.access.limits import Places
from sdbento.errors import LimitReached

BUSY = (
    "too many of your URLs are in use at once, and their hosts have not answered; try again later"
)


class TimeLimit:
    """Seconds that several blocks may take together, one after another."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._left = seconds

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Raises TimeoutError, from within the block, when the time is over."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, self._left)):
                yield
        finally:
            self._left -= time.monotonic() - started


def _new_future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


@dataclass(eq=False)
class Visit:
    """What an owner has, or wishes for, on some hosts: one place, or several as for large data."""

    caller: Caller
    hosts: frozenset[str]
    num_places: int = 1
    admitted: asyncio.Future[None] = field(default_factory=_new_future)


class HostPlaces:
    """Places to deal with hosts. Who finds none waits, in the order of arrival. Who waits because
    of a slow host, or has his share, holds up nobody behind him.

    total: how many there are. each: how many visits an owner may make to one host. Thread-safe.
    """

    def __init__(self, total: int, each: int) -> None:
        self._places = Places(total)
        self._each = each
        self._lock = Lock()
        self._num_on_host: Counter[tuple[str | None, str]] = Counter()
        self._waiting: list[Visit] = []

    @asynccontextmanager
    async def hold(
        self,
        caller: Caller,
        hosts: Collection[str],
        patience: TimeLimit | None = None,
        num_places: int = 1,
    ) -> AsyncIterator[None]:
        """Places for `caller` on all names and addresses of a host. Raises LimitReached when there
        were none in time; `patience` None: waits for as long as it takes."""
        visit = await self.take(caller, hosts, patience, num_places)
        try:
            yield
        finally:
            self.give_back(visit)

    async def take(
        self,
        caller: Caller,
        hosts: Collection[str] = (),
        patience: TimeLimit | None = None,
        num_places: int = 1,
    ) -> Visit:
        """As `hold`; whoever takes it must give it back. Without hosts, only the total counts."""
        visit = Visit(caller, frozenset(hosts), num_places)
        with self._lock:
            if self._has_room(visit):
                self._count(visit, 1)
                return visit
            self._waiting.append(visit)
        try:
            async with nullcontext() if patience is None else patience.running():
                await visit.admitted
        except BaseException as error:
            with self._lock:
                waits = visit in self._waiting
                if waits:
                    self._waiting.remove(visit)
            if not waits:  # it was admitted at the last moment
                self.give_back(visit)
            if patience is not None and isinstance(error, TimeoutError):
                raise LimitReached(BUSY, retry_after=patience.seconds) from None
            raise
        return visit

    def give_back(self, visit: Visit) -> None:
        with self._lock:
            self._count(visit, -1)
            admitted, waiting = [], []
            for other in self._waiting:
                if self._has_room(other):
                    self._count(other, 1)
                    admitted.append(other)
                else:
                    waiting.append(other)
            self._waiting = waiting
        for other in admitted:
            with suppress(RuntimeError):  # its loop is closed: nobody waits any more
                other.admitted.get_loop().call_soon_threadsafe(_admit, other.admitted)

    def _has_room(self, visit: Visit) -> bool:
        owner = visit.caller.owner
        return self._places.has_room(visit.caller, visit.num_places) and all(
            self._num_on_host[owner, host] < self._each for host in visit.hosts
        )

    def _count(self, visit: Visit, change: int) -> None:
        owner = visit.caller.owner
        self._places.change(owner, change * visit.num_places)
        for host in visit.hosts:
            self._num_on_host[owner, host] += change
            if not self._num_on_host[owner, host]:
                del self._num_on_host[owner, host]


class SharedBytes:
    """Bytes in memory, of which every owner leaves room for those of others. For one thread."""

    def __init__(self, limit: int, what: str) -> None:
        self._places = Places(limit, what, f"{what} is used up")

    @contextmanager
    def counting(self, caller: Caller) -> Iterator[Callable[[int], None]]:
        """A function that counts more bytes of `caller`, until the block ends. It raises
        Overloaded when there are too many."""
        counted = 0

        def add(num_bytes: int) -> None:
            nonlocal counted
            if not self._places.has_room(caller, num_bytes):
                raise self._places.refusal(caller)
            counted += num_bytes
            self._places.change(caller.owner, num_bytes)

        try:
            yield add
        finally:
            self._places.change(caller.owner, -counted)


def _admit(admitted: asyncio.Future[None]) -> None:
    if not admitted.done():  # its task may have been cancelled
        admitted.set_result(None)
