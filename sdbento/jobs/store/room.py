"""Who may have how much of the store: room for a job, and the results that must go to make room."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, case, func, or_, select

from sdbento.access.caller import Caller
from sdbento.access.limits import has_place, refusal
from sdbento.jobs.store.database import ROOM_LOCK, wait_for_lock
from sdbento.jobs.table import UNFINISHED, jobs, owner_of_job

ENOUGH_POSTS = 3  # of a webhook that fails, where room is needed; as many as RunPod makes
_MUST_POST = and_(jobs.c.webhook_due.is_not(None), jobs.c.webhook_posts < ENOUGH_POSTS)


@dataclass(frozen=True)
class Limits:
    """How much the store may hold."""

    max_unfinished: int = 1000
    max_finished: int = 10_000
    max_bytes: int = 10 * 2**30  # of inputs, and of results


def ensure_room(connection: Connection, limits: Limits, size: int, caller: Caller) -> None:
    """Raises Overloaded if a job of so many bytes has no room among the unfinished ones. Those
    whose webhook has not had its first posts take a place as well: they must be kept."""
    wait_for_lock(connection, ROOM_LOCK)
    unfinished = jobs.c.status.in_(UNFINISHED)
    nbytes = func.sum(case((unfinished, jobs.c.size), else_=0))
    room = select(owner_of_job, func.count(), nbytes).group_by(owner_of_job)
    room = room.where(or_(unfinished, _MUST_POST))
    rows = connection.execute(room).tuples().all()
    counts = {owner: count for owner, count, _ in rows}
    sizes = {owner: int(nbytes) for owner, _, nbytes in rows}
    most, most_bytes = limits.max_unfinished, limits.max_bytes
    if not has_place(caller, counts, most):
        raise refusal(
            caller,
            counts,
            most,
            what="the unfinished jobs (SDBENTO_MAX_JOBS)",
            full=f"{sum(counts.values())} jobs are unfinished, the limit is {most} "
            "(SDBENTO_MAX_JOBS)",
        )
    if not has_place(caller, sizes, most_bytes, size):
        raise refusal(
            caller,
            sizes,
            most_bytes,
            what="the bytes of unfinished jobs",
            full=f"the unfinished jobs have {sum(sizes.values())} bytes, with this one more "
            f"than the limit of {most_bytes}",
        )


def excess(connection: Connection, limits: Limits) -> list[Row[Any]]:
    """The finished jobs that must go to be within the limits: of whoever has most of what there
    is too much of, the oldest, so that nobody's results drive out another's."""
    finished = connection.execute(
        select(
            jobs.c.id,
            jobs.c.run,
            jobs.c.size,
            _MUST_POST.label("must_post"),
            owner_of_job,
        )
        .where(jobs.c.status.not_in(UNFINISHED))
        .order_by(jobs.c.finished.desc())
    ).all()
    counts: Counter[str | None] = Counter()
    sizes: Counter[str | None] = Counter()
    removable: dict[str | None, list[Row[Any]]] = {}  # the oldest at the end
    for row in finished:
        counts[row.owner] += 1
        sizes[row.owner] += row.size
        if not row.must_post:
            removable.setdefault(row.owner, []).append(row)
    these = []
    while any(removable.values()):
        if counts.total() > limits.max_finished:
            most = counts
        elif sizes.total() > limits.max_bytes:
            most = sizes
        else:
            break
        owner = max((o for o, rows in removable.items() if rows), key=most.__getitem__)
        row = removable[owner].pop()
        counts[owner] -= 1
        sizes[owner] -= row.size
        these.append(row)
    return these
