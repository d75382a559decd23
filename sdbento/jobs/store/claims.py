"""Which of the jobs that wait a server takes next: owners take turns.

    Queue.heads (SQL) -> Turns.next -> Queue.take (SQL) -> Turns.count -> again

Several servers look at the same queue, so a job is taken with SKIP LOCKED: nobody waits for
another's claim. Knows nothing of what a job computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    CTE,
    Connection,
    Row,
    Select,
    and_,
    not_,
    or_,
    select,
    update,
)

from sdbento.access.caller import Caller
from sdbento.access.limits import has_place
from sdbento.jobs.table import is_waiting, jobs, owner_of_job, queue_owner

SUSPECT_INTERRUPTIONS = 3  # deaths of the server during a job after which the job is run alone
MODEL_PATIENCE = 10_000  # ms for which a job is left to servers that have its model in memory

Heads = dict[str | None, Row[Any]]  # by owner


class Queue:
    """The jobs that wait and may be claimed, in one transaction. Nothing here reads all of them:
    an index has them by owner, in the order in which each owner's are run.

    elsewhere: models whose jobs are left to other servers for a while.
    """

    def __init__(self, connection: Connection, now: int, elsewhere: Collection[str]) -> None:
        self._connection = connection
        left = and_(jobs.c.model.in_(elsewhere), jobs.c.created > now - MODEL_PATIENCE)
        can_run = jobs.c.expires > now, or_(jobs.c.model.is_(None), not_(left))
        first = select(jobs.c.number).where(is_waiting, *can_run)
        self._first = first.order_by(jobs.c.low_priority, jobs.c.number).limit(1)

    def heads(self) -> Heads:
        """The first job of each owner."""
        owners = _owners()
        number = self._first.where(queue_owner == owners.c.owner).correlate(owners)
        return self._read(select(number.scalar_subquery()).select_from(owners))

    def head(self, row: Row[Any]) -> Heads:
        """The first job of the owner of `row`, if there is one."""
        return self._read(self._first.where(queue_owner == _in_queue(row)))

    def _read(self, numbers: Select[Any]) -> Heads:
        shown = owner_of_job, jobs.c.key_name, jobs.c.address, jobs.c.interruptions
        order = jobs.c.low_priority, jobs.c.number
        query = select(*shown, *order).where(jobs.c.number.in_(numbers))
        return {row.owner: row for row in self._connection.execute(query)}

    def take(self, head: Row[Any], values: dict[str, Any], *, alone: bool) -> Row[Any] | None:
        """Set `values` in the first job of that owner that nobody else is taking. None: there is
        none. alone: whether it may be one that is only run alone."""
        first = self._first.where(queue_owner == _in_queue(head))
        if not alone:
            first = first.where(jobs.c.interruptions < SUSPECT_INTERRUPTIONS)
        this = jobs.c.number == first.with_for_update(skip_locked=True).scalar_subquery()
        taken = update(jobs).where(this).values(values).returning(*jobs.c)
        return self._connection.execute(taken).one_or_none()


def _in_queue(row: Row[Any]) -> str:
    """As `queue_owner`."""
    return row.owner or ""


def _owners() -> CTE:
    """The owners who have jobs in the queue, found one after another: each by a look into the
    index, whatever the number of jobs is. The last row is empty."""
    next_one = select(queue_owner).where(is_waiting).order_by(queue_owner).limit(1)
    first = select(next_one.scalar_subquery().label("owner"))
    owners = first.cte("owners", recursive=True)
    later = next_one.where(queue_owner > owners.c.owner).correlate(owners)
    each = select(later.scalar_subquery()).select_from(owners)
    return owners.union_all(each.where(owners.c.owner.is_not(None)))


@dataclass
class Turns:
    """Who goes next on a server where each owner has so many jobs running.

    places: that the server has, also those taken. interruptions: of the running job with most.
    max_owners: so many owners get their first job whatever the places are. shared: whether several
    keys share the places.
    """

    running: Counter[str | None]
    places: int
    max_owners: int
    shared: bool
    interruptions: int

    def next(self, heads: Heads) -> Row[Any] | None:
        """Which of the first jobs of all owners is run next: of an owner who has fewer running than
        the others. So a low priority puts a job behind others of its owner only.

        Owners who have no place are taken out of `heads`.
        """
        for row in sorted(heads.values(), key=self._place):
            if self.running and max(self.interruptions, row.interruptions) >= SUSPECT_INTERRUPTIONS:
                return None
            if self._has_place(row):
                return row
            del heads[row.owner]
        return None

    def _place(self, row: Row[Any]) -> tuple[int, int, int]:
        return self.running[row.owner], row.low_priority, row.number

    def _has_place(self, row: Row[Any]) -> bool:
        caller = Caller(row.key_name, shares=self.shared, address=row.address)
        is_first = row.owner not in self.running and len(self.running) < self.max_owners
        return is_first or has_place(caller, self.running, self.places)

    def count(self, owner: str | None, interruptions: int) -> None:
        """A job was claimed that was interrupted so often."""
        self.running[owner] += 1
        self.interruptions = max(self.interruptions, interruptions)
