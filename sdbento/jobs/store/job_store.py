r"""Jobs that outlive the process: rows in a database, results in files.

    IN_QUEUE --> IN_PROGRESS --> COMPLETED, FAILED, TIMED_OUT, CANCELLED
       |  ^___________|  release, or its server has died
       \--> CANCELLED, TIMED_OUT

Every change of status is one UPDATE that names the status which it starts from; the end of a run
names the run and its server as well. So if two callers want to end a job, one of them does and the
other learns that it did not. A result is a whole file on the disk before its row says COMPLETED.

Any number of servers may share a PostgreSQL database (`fleet/servers.py`); SQLite, and a folder,
belong to one server at a time. The SQL is the same for both, but for locks on rows.

Everything blocks and is thread-safe. Knows nothing of HTTP, of the App and of what a job computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    delete,
    func,
    insert,
    not_,
    or_,
    select,
    update,
)

from sdbento.access.caller import Caller
from sdbento.errors import NotFound
from sdbento.jobs.fleet.bucket_results import BucketResults
from sdbento.jobs.fleet.notices import Hear, Listener, tell
from sdbento.jobs.fleet.servers import State
from sdbento.jobs.results import IsNeeded, Results
from sdbento.jobs.store.claims import Queue, Turns
from sdbento.jobs.store.database import TIDY_LOCK, try_lock
from sdbento.jobs.store.ends import final, interrupt, leave_future
from sdbento.jobs.store.events import EventsOfJobs
from sdbento.jobs.store.room import Limits, ensure_room, excess
from sdbento.jobs.store.session import JobDatabase
from sdbento.jobs.store.webhook_queue import WebhookQueue
from sdbento.jobs.table import (
    RETRIABLE,
    SHOWN,
    UNFINISHED,
    Job,
    NewJob,
    Status,
    events,
    jobs,
    owner_of_job,
)

VACUUM_PAGES = 10_000  # free pages returned to the file system at a time


@dataclass(frozen=True)
class Counts:
    """How many jobs the store has."""

    by_status: dict[Status, int]
    retries: int  # how often clients have asked for one to be run again


class JobStore:
    """The jobs of one server, or of all that share a PostgreSQL database. `close` it at the end.

    folder: of this server, for the lock and what else it needs; created if it is missing.
    url: of the database, as SQLAlchemy writes it; None: SQLite in the folder.
    results: where they are kept, for all that share the database; None: in the folder.
    webhooks, events: what is to be told of jobs.
    Raises Unavailable if another server has the folder, or the database if that is SQLite.
    """

    def __init__(
        self,
        folder: Path,
        url: str | None = None,
        *,
        results: Results | BucketResults | None = None,
        limits: Limits | None = None,
        clock: Callable[[], int] | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._results = results or Results(folder / "results")
        self._database = JobDatabase(folder, url, place=self._results.place, clock=clock)
        self.webhooks = WebhookQueue(self._database)
        self.events = EventsOfJobs(self._database)

    @property
    def is_shared(self) -> bool:
        """Whether other servers may use the same database."""
        return self._database.is_shared

    def now(self) -> int:
        """The time, by the clock that the times of jobs are by."""
        return self._database.now()

    def close(self) -> None:
        """Jobs that this server still runs are at once the others'."""
        self._database.close()

    def recover(self) -> int:
        """At a start, put the jobs back into the queue that ran when the last process died, and
        those of other servers that have died.

        Returns how many. A job that was interrupted too often fails instead. No job may run yet.
        """
        with self._database.transaction() as connection:
            self._database.servers.begin(connection)
            if self._database.servers.is_only(connection):
                leave_future(connection, self._database.now())
        count = len(self.take_over())
        with self._database.snapshot() as connection:
            rows = connection.execute(select(jobs.c.id, jobs.c.run, jobs.c.status)).all()
        self._results.keep_only(_is_needed({row.id: row for row in rows}))
        return count

    def beat(self, state: State | None = None) -> list[str]:
        """Show the other servers that this one lives, and `take_over` the jobs of the dead. Every
        BEAT seconds, where the database is shared."""
        with self._database.engine.begin() as connection:
            self._database.compare_clocks(connection)
            self._database.servers.beat(connection, state or State())
        return self.take_over()

    def take_over(self) -> list[str]:
        """Put the jobs of servers that have died back into the queue. Returns their ids."""
        with self._database.transaction() as connection:
            self._database.servers.bury(connection)
            gone = or_(jobs.c.server.is_(None), jobs.c.server.not_in(self._database.servers.living))
            return interrupt(connection, gone, self._database.now())

    def requeue(self, running: Collection[str]) -> int:
        """Put all jobs that this server has IN_PROGRESS, except those `running`, back into the
        queue.

        Returns how many. A job that was interrupted too often fails instead.
        """
        lost = jobs.c.server == self._database.servers.own, jobs.c.id.not_in(running)
        with self._database.transaction() as connection:
            return len(interrupt(connection, and_(*lost), self._database.now()))

    def over(self, runs: Mapping[str, int]) -> list[str]:
        """Those of this server's `runs`, by the ids of their jobs, that have ended otherwise: the
        job was cancelled, or another server has taken it over."""
        if not runs:
            return []
        # What this server itself has just ended is not lost, though its work may seem to go on.
        own = (
            jobs.c.server == self._database.servers.own,
            jobs.c.status.not_in(("IN_QUEUE", "CANCELLED")),
        )
        found = select(jobs.c.id, jobs.c.run).where(jobs.c.id.in_(runs), *own)
        with self._database.snapshot() as connection:
            left = dict(connection.execute(found).tuples().all())
        return [job_id for job_id, run in runs.items() if left.get(job_id) != run]

    def add(self, new: NewJob, *, shared: bool = False) -> None:
        """Accept a job. Raises Overloaded if there are too many jobs or too many bytes of them.

        shared: whether several keys share the room.
        """
        now, size = self._database.now(), len(new.input)
        values = vars(new) | {
            "status": "IN_QUEUE" if new.error is None else "FAILED",
            "low_priority": int(new.low_priority),
            "run": 0,
            "retries": 0,
            "interruptions": 0,
            "size": size,
            "created": now,
            "expires": now + new.ttl,
            "webhook_posts": 0,
        }
        if new.error is not None:  # do not keep the input: bad ones could fill the disk
            values |= {"input": None, "s3_config": None, "size": 0}
            values |= {"finished": now, "delete_after": now + new.keep}
            values |= {"webhook_due": now if new.webhook else None}
        with self._database.transaction() as connection:
            if new.error is None or new.webhook:
                caller = Caller(new.key_name, shares=shared, address=new.address)
                ensure_room(connection, self._limits, values["size"], caller)
            connection.execute(insert(jobs).values(values))
            if new.error is None:
                tell(connection, "queued")

    def get(self, job_id: str) -> Job | None:
        """The job, without its input; None if there is none, or its time is over, though it may not
        be deleted yet."""
        kept = or_(jobs.c.delete_after.is_(None), jobs.c.delete_after > self._database.now())
        with self._database.snapshot() as connection:
            row = connection.execute(select(*SHOWN).where(jobs.c.id == job_id, kept)).one_or_none()
        return None if row is None else Job.of(row)

    def claim(
        self,
        limit: int,
        *,
        max_owners: int = 0,
        running: Mapping[str, str | None] | None = None,
        made: Collection[str] = (),
        shared: bool = False,
        except_of: Collection[str] = (),
    ) -> list[Job]:
        """Set up to `limit` jobs IN_PROGRESS: owners take turns, and of each owner's jobs the
        oldest go first, those of low priority last. Clients without keys have the reserve beyond it
        (`has_place`); `limit` is 0 or less when some of that is taken.

        An owner who has no job running gets one whatever the `limit` is, until there are
        `max_owners` who have one: jobs may run for days, and nobody is to wait for those of others.

        The caller is then responsible for running them and for ending or releasing each.

        running: the jobs that take a place to run, and their owners: also cancelled jobs, until
        their work has stopped. made: the jobs IN_PROGRESS that take none any more.
        shared: whether several keys share the places to run.
        except_of: owners whose jobs must wait.

        A job during which the server died several times is run alone: if the server dies again, it
        is known which job was to blame.
        """
        now = self._database.now()
        values = {"status": "IN_PROGRESS", "started": now, "run": jobs.c.run + 1}
        values |= {"server": self._database.servers.own}
        claimed: list[Job] = []
        with self._database.transaction() as connection:
            self._database.servers.ensure_lease(connection)
            num_of, interruptions = self._running_here(connection, running or {}, made)
            turns = Turns(num_of, num_of.total() + limit, max_owners, shared, interruptions)
            queue = Queue(connection, now, self._database.servers.models_elsewhere(connection))
            heads = queue.heads()
            for owner in heads.keys() & {*except_of}:
                del heads[owner]
            while head := turns.next(heads):
                del heads[head.owner]
                row = queue.take(head, values, alone=not turns.running)
                if row is None:
                    continue  # others were faster
                claimed.append(job := Job.of(row))
                turns.count(job.owner, row.interruptions)
                heads |= queue.head(head)
        return claimed

    def _running_here(
        self,
        connection: Connection,
        running: Mapping[str, str | None],
        made: Collection[str],
    ) -> tuple[Counter[str | None], int]:
        """How many jobs of each owner are `running`, or IN_PROGRESS here and not `made`; and how
        often that one was interrupted which was so most often."""
        own = jobs.c.status == "IN_PROGRESS", jobs.c.server == self._database.servers.own
        query = select(jobs.c.id, owner_of_job, jobs.c.interruptions).where(*own)
        rows = connection.execute(query).all()
        others = [row.owner for row in rows if row.id not in running and row.id not in made]
        most = max((row.interruptions for row in rows), default=0)
        return Counter([*running.values(), *others]), most

    def release(self, job: Job) -> bool:
        """Put a running job back into the queue, at its old place.

        Returns False if it has ended in another way meanwhile.
        """
        return self._end_run(job, {"status": "IN_QUEUE", "started": None})

    def complete(self, job: Job, result: bytes) -> bool:
        """Store the result of a running job, which ends it.

        Returns False, and stores nothing, if the job has ended in another way meanwhile.
        """
        self._results.write(job.id, job.run, result)
        ended = self._end_run(
            job,
            final("COMPLETED", self._database.now())
            | {"input": None, "size": len(result), "error": None},
        )
        if not ended:
            self._results.delete(job.id, job.run)
        return ended

    def fail(self, job: Job, error: str, status: Status = "FAILED") -> bool:
        """End a running job without a result.

        Returns False if it has ended in another way meanwhile.
        """
        return self._end_run(job, final(status, self._database.now()) | {"error": error})

    def result(self, job: Job) -> bytes | None:
        """The result of a completed job; None for any other job.

        Raises NotFound if the file of the result is missing or damaged.
        """
        if job.status != "COMPLETED":
            return None
        result = self._results.read(job.id, job.run)
        if result is None or len(result) != job.size:
            raise _lost(job)
        return result

    def part_of_result(self, job: Job, start: int, num_bytes: int) -> bytes:
        """A part of the result of a completed job. Raises NotFound if it is missing."""
        try:
            return self._results.read_part(job.id, job.run, start, num_bytes)
        except FileNotFoundError:
            raise _lost(job) from None

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a job unless it has finished. Returns the job as it is then; None if unknown."""
        self._end_where(jobs.c.id == job_id, UNFINISHED, final("CANCELLED", self._database.now()))
        job = self.get(job_id)
        # If the database was away, the result may have been written before the job was cancelled.
        if job is not None and job.status == "CANCELLED":
            self._results.delete(job.id, job.run)
        return job

    def purge(self, key_name: str | None = None, address: str | None = None) -> list[str]:
        """Cancel all jobs in the queue of that key; without one, of that address. Returns their
        ids."""
        mine = _is_of(key_name), jobs.c.address.is_not_distinct_from(address)
        return self._end_where(and_(*mine), ("IN_QUEUE",), final("CANCELLED", self._database.now()))

    def expire(self) -> list[str]:
        """End the jobs that have been in the queue for longer than their ttl. Returns their ids."""
        values = final("TIMED_OUT", self._database.now())
        values["error"] = "the job waited in the queue for longer than its ttl"
        return self._end_where(jobs.c.expires <= self._database.now(), ("IN_QUEUE",), values)

    def retry(self, job_id: str, *, shared: bool = False) -> bool:
        """Queue a failed or timed-out job again, with the same input.

        shared: as in `add`. Returns False if it is neither, or if its input is not kept: a bad one,
        or one with an s3Config. Raises Overloaded like `add`.
        """
        now = self._database.now()
        this = jobs.c.id == job_id, jobs.c.status.in_(RETRIABLE), jobs.c.input.is_not(None)
        values = {
            "status": "IN_QUEUE",
            "retries": jobs.c.retries + 1,
            "created": now,
            "expires": now + jobs.c.ttl,
            "webhook_posts": 0,
            "interruptions": 0,
        }
        values |= dict.fromkeys(("started", "finished", "delete_after", "error", "webhook_due"))
        with self._database.transaction() as connection:
            found = connection.execute(select(jobs.c.key_name, jobs.c.address).where(*this)).all()
            if not found:
                return False
            caller = Caller(found[0].key_name, shares=shared, address=found[0].address)
            ensure_room(connection, self._limits, 0, caller)
            is_queued = connection.execute(update(jobs).where(*this).values(values)).rowcount == 1
            if is_queued:
                connection.execute(delete(events).where(events.c.job == job_id))
                tell(connection, "queued")
            return is_queued

    def counts(self, key_name: str | None = None) -> Counts:
        """How many jobs of that key there are; None: of all without one."""
        mine = _is_of(key_name)
        grouped = select(jobs.c.status, func.count()).where(mine).group_by(jobs.c.status)
        retried = select(func.sum(jobs.c.retries)).where(mine)
        with self._database.snapshot() as connection:
            found = dict(connection.execute(grouped).tuples().all())
            retries = connection.execute(retried).scalar_one()
        return Counts({status: found.get(status, 0) for status in get_args(Status)}, retries or 0)

    def totals(self) -> dict[Status, int]:
        """How many jobs of everybody there are, by status."""
        grouped = select(jobs.c.status, func.count()).group_by(jobs.c.status)
        with self._database.snapshot() as connection:
            found = dict(connection.execute(grouped).tuples().all())
        return {status: found.get(status, 0) for status in get_args(Status)}

    def listener(self, hear: Hear) -> Listener:
        """Hears what other servers tell."""
        return Listener(self._database.engine, hear)

    def workers(self, key_name: str | None = None) -> list[tuple[State, bool]]:
        """What the other servers tell of themselves, and whether they run jobs of that key."""
        mine = jobs.c.status == "IN_PROGRESS", _is_of(key_name)
        with self._database.snapshot() as connection:
            others = self._database.servers.others(connection)
            busy = {*connection.execute(select(jobs.c.server).where(*mine)).scalars()}
        return [(state, server in busy) for server, state in others.items()]

    def take_output(self, job: Job) -> bool:
        """Whether /stream is to send the output of this run: once, whichever server is asked."""
        this = jobs.c.id == job.id, jobs.c.run == job.run, jobs.c.status == "COMPLETED"
        sent = jobs.c.streamed.is_not_distinct_from(job.run)
        first = update(jobs).where(*this, not_(sent)).values(streamed=job.run)
        with self._database.transaction() as connection:
            return connection.execute(first).rowcount == 1

    def tidy(self) -> list[str]:
        """Delete finished jobs: those past their time, then the oldest beyond the limits.

        Jobs whose webhook is still to be posted stay, unless it has failed often and room is
        needed. Returns the ids of the deleted ones.
        """
        expired = (
            jobs.c.delete_after <= self._database.now(),
            jobs.c.status.not_in(UNFINISHED),
            jobs.c.webhook_due.is_(None),
        )
        with self._database.transaction() as connection:
            if not try_lock(connection, TIDY_LOCK):  # another server does it
                return []
            rows = connection.execute(select(jobs.c.id, jobs.c.run).where(*expired)).all()
            self._forget(connection, rows)
            more = excess(connection, self._limits)
            self._forget(connection, more)
        for row in (*rows, *more):
            self._results.delete(row.id, row.run)
        self._database.vacuum(VACUUM_PAGES)
        return [row.id for row in (*rows, *more)]

    def _forget(self, connection: Connection, rows: Iterable[Row[Any]]) -> None:
        for row in rows:
            connection.execute(delete(jobs).where(jobs.c.id == row.id))
            connection.execute(delete(events).where(events.c.job == row.id))

    def _end_run(self, job: Job, values: dict[str, Any]) -> bool:
        """End this run of the job. Returns whether it has ended like this.

        That is also so if a call before did it, whose answer was lost with the connection.
        """
        this = jobs.c.id == job.id, jobs.c.run == job.run, jobs.c.server == job.server
        end = update(jobs).where(*this, jobs.c.status == "IN_PROGRESS").values(values)
        same = select(jobs.c.id).where(*this, jobs.c.status == values["status"])
        with self._database.transaction() as connection:
            if not connection.execute(end).rowcount:
                return bool(connection.execute(same).all())
            tell(connection, "queued" if values["status"] == "IN_QUEUE" else "ended", job.id)
            return True

    def _end_where(
        self, condition: Any, statuses: tuple[Status, ...], values: dict[str, Any]
    ) -> list[str]:
        """Change all jobs that meet `condition` and have one of `statuses`. Returns their ids."""
        found = select(jobs.c.number).where(condition, jobs.c.status.in_(statuses))
        # In one order everywhere, lest two servers wait for each other.
        these = jobs.c.number.in_(found.order_by(jobs.c.number).with_for_update())
        ended = update(jobs).where(these).values(values).returning(jobs.c.id)
        with self._database.transaction() as connection:
            ids = [*connection.execute(ended).scalars()]
            for job_id in ids:
                tell(connection, "ended", job_id)
            return ids


def _is_needed(rows: Mapping[str, Row[Any]]) -> IsNeeded:
    """Whether a result may still be named by a row, given the rows of a moment ago: other servers
    may have begun runs, and ended them, since."""

    def is_needed(job_id: str, run: int) -> bool | None:
        if (row := rows.get(job_id)) is None:
            return None
        has_result = row.status in ("IN_PROGRESS", "COMPLETED")
        return run > row.run or (run == row.run and has_result)

    return is_needed


def _lost(job: Job) -> NotFound:
    return NotFound(f"the result of job {job.id} is no longer there", param="id")


def _is_of(key_name: str | None) -> ColumnElement[bool]:
    return jobs.c.key_name.is_not_distinct_from(key_name)
