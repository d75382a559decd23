"""Which webhooks are posted next, and by which server: owners take turns, and their hosts."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import ColumnElement, Select, and_, case, func, not_, or_, select, update

from sdbento.jobs.store.session import JobDatabase
from sdbento.jobs.table import SHOWN, Job, jobs, owner_of_job


class WebhookQueue:
    """The webhooks of finished jobs that are still to be posted."""

    def __init__(self, database: JobDatabase) -> None:
        self._database = database

    def due(self, limit: int, each: int, posting: Collection[str] = ()) -> list[Job]:
        """Finished jobs, up to `limit`, whose webhook is to be posted now, without their inputs.
        The caller is then responsible for posting them: other servers do not, while this one lives.

        Owners take turns, and of an owner's posts the hosts, so that many posts to a slow host do
        not hide those to others; of the posts to a host those go first that were made least often.

        each: of one owner's posts to a host, how many may be under way. posting: the jobs whose
        posts are, here; they count, as do those of other servers, and are not among the result.
        """
        others = jobs.c.webhook_server != self._database.servers.own
        elsewhere = and_(others, jobs.c.webhook_server.in_(self._database.servers.living))
        taken = or_(jobs.c.id.in_(posting), func.coalesce(elsewhere, False))
        chosen = _in_turn(self._database.now(), taken, each).limit(limit)
        with self._database.snapshot() as connection:
            numbers = list(connection.execute(chosen).scalars())
        if not numbers:
            return []
        still = jobs.c.webhook_due.is_not(None), not_(taken)
        free = select(jobs.c.number).where(jobs.c.number.in_(numbers), *still)
        these = jobs.c.number.in_(free.with_for_update(skip_locked=True))
        values = {"webhook_server": self._database.servers.own}
        with self._database.transaction() as connection:
            claimed = update(jobs).where(these).values(values).returning(*SHOWN)
            found = {row.number: row for row in connection.execute(claimed)}
        return [Job.of(found[number]) for number in numbers if number in found]

    def note(self, job: Job, again_in: int | None) -> None:
        """Note that a webhook was posted: for the last time (None), or again in so many ms."""
        due = None if again_in is None else self._database.now() + again_in
        values = {"webhook_due": due, "webhook_posts": job.webhook_posts + 1}
        values |= {"webhook_server": None}
        # Not if the job was retried meanwhile: its next end has a post of its own.
        this = jobs.c.id == job.id, jobs.c.run == job.run, jobs.c.finished == job.finished
        with self._database.transaction() as connection:
            connection.execute(update(jobs).where(*this).values(values))


def _in_turn(now: int, taken: ColumnElement[bool], each: int) -> Select[tuple[int]]:
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
