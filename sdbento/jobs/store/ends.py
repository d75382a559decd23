"""How jobs end, and what becomes of those whose server has died, as changes of their rows."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, case, select, update

from sdbento.jobs.fleet.notices import tell
from sdbento.jobs.table import RETRIABLE, UNFINISHED, Status, jobs

MAX_INTERRUPTIONS = 20  # deaths after which it is not run again: it may be what kills the server


def final(status: Status, now: int) -> dict[str, Any]:
    """The columns of a job that ends now, with that status."""
    values: dict[str, Any] = {"status": status, "finished": now}
    values["delete_after"] = now + jobs.c.keep
    values["webhook_due"] = case((jobs.c.webhook.is_not(None), now), else_=None)
    values |= {"input": None, "size": 0, "s3_config": None}
    if status in RETRIABLE:  # keep the input, unless it needs credentials, which are not kept
        kept = jobs.c.s3_config.is_(None)
        values["input"] = case((kept, jobs.c.input), else_=None)
        values["size"] = case((kept, jobs.c.size), else_=0)
    return values


def interrupt(connection: Connection, lost: ColumnElement[bool], now: int) -> list[str]:
    """Put the `lost` jobs that are IN_PROGRESS back into the queue. Returns their ids, without
    those that fail since they were interrupted too often."""
    found = select(jobs.c.number).where(lost, jobs.c.status == "IN_PROGRESS")
    these = jobs.c.number.in_(found.with_for_update(skip_locked=True))
    worn = jobs.c.interruptions >= MAX_INTERRUPTIONS - 1
    values = {"status": "IN_QUEUE", "started": None, "interruptions": jobs.c.interruptions + 1}
    failed = final("FAILED", now) | {
        "error": f"the server died {MAX_INTERRUPTIONS} times while it ran this job; it is not "
        "run again"
    }
    ended = update(jobs).where(these, worn).values(failed).returning(jobs.c.id)
    for job_id in connection.execute(ended).scalars():
        tell(connection, "ended", job_id)
    again = update(jobs).where(these).values(values).returning(jobs.c.id)
    queued = [*connection.execute(again).scalars()]
    if queued:
        tell(connection, "queued")
    return queued


def leave_future(connection: Connection, now: int) -> None:
    """Take times that lie ahead as now: the clock was set back since the last process.

    Webhooks would have to wait, and results would be kept, until the clock is there again.
    """
    waiting = {"created": now, "expires": now + jobs.c.ttl}
    ended = {"finished": now, "delete_after": now + jobs.c.keep}
    ended |= {"webhook_due": case((jobs.c.webhook_due.is_not(None), now), else_=None)}
    unfinished = jobs.c.status.in_(UNFINISHED)
    connection.execute(update(jobs).where(jobs.c.created > now, unfinished).values(waiting))
    connection.execute(update(jobs).where(jobs.c.finished > now).values(ended))
