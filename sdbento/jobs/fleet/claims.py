"""Which of the jobs that wait a server takes next, and which webhooks: owners take turns.

    next_of_each (SQL) -> Turns.choose -> take (SQL) -> again, if others were faster

Several servers look at the same queue, so those chosen are locked with SKIP LOCKED: nobody waits
for another's claim. Knows nothing of what a job computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    case,
    func,
    not_,
    or_,
    select,
    update,
)

from sdbento.access.caller import Caller
from sdbento.access.limits import has_place
from sdbento.jobs.table import jobs, owner_of_job

SUSPECT_INTERRUPTIONS = 3  # deaths of the server during a job after which the job is run alone
MODEL_PATIENCE = 10_000  # ms for which a job is left to servers that have its model in memory
SPARE = 64  # jobs of each owner that are looked at beyond those needed: others may be faster


def next_of_each(
    now: int, limit: int, except_of: Collection[str], elsewhere: Collection[str]
) -> Select[Any]:
    """The first `limit` jobs of each owner that can be run, with their `place` among its jobs.

    For a while, jobs of the models that are `elsewhere` are left to other servers.
    """
    left = and_(jobs.c.model.in_(elsewhere), jobs.c.created > now - MODEL_PATIENCE)
    first = jobs.c.low_priority, jobs.c.number
    place = func.row_number().over(partition_by=owner_of_job, order_by=first).label("place")
    waiting = (
        select(owner_of_job, jobs.c.key_name, jobs.c.address, jobs.c.interruptions, *first, place)
        .where(jobs.c.status == "IN_QUEUE", jobs.c.expires > now)
        .where(or_(owner_of_job.is_(None), owner_of_job.not_in(except_of)))
        .where(or_(jobs.c.model.is_(None), not_(left)))
        .subquery()
    )
    return select(waiting).where(waiting.c.place <= limit)


def take(
    connection: Connection, rows: Iterable[Row[Any]], values: dict[str, Any]
) -> dict[int, Row[Any]]:
    """Set `values` in those of the `rows` that still wait and that nobody else is taking.

    Returns these, by their number.
    """
    numbers = [row.number for row in rows]
    free = select(jobs.c.number).where(jobs.c.number.in_(numbers), jobs.c.status == "IN_QUEUE")
    free = free.with_for_update(skip_locked=True)
    taken = update(jobs).where(jobs.c.number.in_(free)).values(values).returning(*jobs.c)
    return {row.number: row for row in connection.execute(taken)}


def webhooks_in_turn(now: int, taken: ColumnElement[bool], each: int) -> Select[tuple[int]]:
    """The numbers of jobs with a webhook that is due and not `taken`, in turn; those that are count
    among the posts under way, of which each owner has `each` to a host."""
    is_new = case((taken, 0), else_=1).label("is_new")
    first = is_new, jobs.c.webhook_posts, jobs.c.webhook_due, jobs.c.number
    host = owner_of_job, jobs.c.webhook_host
    at_host = func.row_number().over(partition_by=host, order_by=first).label("at_host")
    due = select(owner_of_job, *first, at_host).where(jobs.c.webhook_due <= now).subquery()
    turn = due.c.is_new, due.c.at_host, due.c.webhook_posts, due.c.webhook_due
    place = func.row_number().over(partition_by=due.c.owner, order_by=turn).label("place")
    allowed = (
        select(due.c.number, due.c.webhook_due, due.c.is_new, place)
        .where(due.c.at_host <= each)
        .subquery()
    )
    return (
        select(allowed.c.number)
        .where(allowed.c.is_new == 1)
        .order_by(allowed.c.place, allowed.c.webhook_due, allowed.c.number)
    )


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

    def in_turn(self, rows: Iterable[Row[Any]]) -> list[Row[Any]]:
        """The order in which these jobs are run: those go first whose owner has fewer jobs before
        them, running ones included. So a low priority puts a job behind others of its owner only.
        """
        return sorted(
            rows,
            key=lambda row: (self.running[row.owner] + row.place, row.low_priority, row.number),
        )

    def choose(self, rows: Iterable[Row[Any]]) -> list[Row[Any]]:
        """Those of the rows, which are in turn, that can be run now."""
        running, interruptions = Counter(self.running), self.interruptions
        chosen = []
        for row in rows:
            interruptions = max(interruptions, row.interruptions)
            if interruptions >= SUSPECT_INTERRUPTIONS and running:
                break
            caller = Caller(row.key_name, shares=self.shared, address=row.address)
            is_first = row.owner not in running and len(running) < self.max_owners
            if is_first or has_place(caller, running, self.places):
                chosen.append(row)
                running[row.owner] += 1
        return chosen

    def count(self, rows: Iterable[Row[Any]]) -> None:
        """These were claimed."""
        for row in rows:
            self.running[row.owner] += 1
            self.interruptions = max(self.interruptions, row.interruptions)
