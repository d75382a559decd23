r"""Jobs that outlive the process: rows in a database, results in files.

    IN_QUEUE --> IN_PROGRESS --> COMPLETED, FAILED, TIMED_OUT, CANCELLED
       |  ^___________|  release, or its server has died
       \--> CANCELLED, TIMED_OUT

Every change of status is one UPDATE that names the status which it starts from; the end of a run
names the run and its server as well. So if two callers want to end a job, one of them does and the
other learns that it did not. A result is a whole file on the disk before its row says COMPLETED.

Any number of servers may share a PostgreSQL database (`fleet/servers.py`); SQLite, and a folder,
belong to one server at a time. The SQL is the same for both, but for locks on rows.

Lock order: the locks on folder and database, held for the life of the store, then `_writing`, held
for one transaction. Everything blocks and is thread-safe. Knows nothing of HTTP, of the App and of
what a job computes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, get_args

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    case,
    delete,
    func,
    insert,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError

from sdbento.access.caller import Caller
from sdbento.access.limits import has_place, refusal
from sdbento.errors import NotFound, Unavailable
from sdbento.jobs.database import (
    ROOM_LOCK,
    TIDY_LOCK,
    connect,
    make_tables,
    try_lock,
    wait_for_lock,
)
from sdbento.jobs.fleet.bucket_results import BucketResults
from sdbento.jobs.fleet.claims import Queue, Turns, webhooks_in_turn
from sdbento.jobs.fleet.clock import DatabaseClock
from sdbento.jobs.fleet.notices import Hear, Listener, tell
from sdbento.jobs.fleet.servers import Servers, State
from sdbento.jobs.locks import LockFile, lock_database, lock_folder
from sdbento.jobs.progress import Message
from sdbento.jobs.results import IsNeeded, Results
from sdbento.jobs.table import (
    RETRIABLE,
    UNFINISHED,
    Job,
    NewJob,
    Status,
    events,
    jobs,
    metadata,
    milliseconds,
    owner_of_job,
)

MAX_INTERRUPTIONS = 20  # deaths after which it is not run again: it may be what kills the server
ENOUGH_POSTS = 3  # of a webhook that fails, where room is needed; as many as RunPod makes
_MUST_POST = and_(jobs.c.webhook_due.is_not(None), jobs.c.webhook_posts < ENOUGH_POSTS)
# Columns that are read only to run the job: an input may have many megabytes.
TO_RUN = ("input", "s3_config")
_SHOWN = [column for column in jobs.c if column.key not in TO_RUN]
VACUUM_PAGES = 10_000  # free pages returned to the file system at a time


@dataclass(frozen=True)
class Limits:
    """How much the store may hold."""

    max_unfinished: int = 1000
    max_finished: int = 10_000
    max_bytes: int = 10 * 2**30  # of inputs, and of results


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
        folder.mkdir(parents=True, exist_ok=True)
        self._results = results or Results(folder / "results")
        self._engine = connect(url, folder)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        self._database_clock = DatabaseClock()
        self._now = clock or (milliseconds if self._is_sqlite else self._database_clock)
        # SQLite has one writer at a time, for which others would poll.
        self._writing: AbstractContextManager[Any] = Lock() if self._is_sqlite else nullcontext()
        self._lost: str | None = None  # why this server no longer has its locks, if so
        self._locks: list[LockFile] = [lock_folder(folder)]
        try:
            place = "" if self._is_sqlite else self._results.place()
            self._servers = Servers(self._engine, folder, place)
            if url is not None and (lock := lock_database(self._engine)) is not None:
                self._locks.append(lock)
            make_tables(self._engine, metadata)
            with self._engine.begin() as connection:
                if self.is_shared:
                    self._database_clock.compare(connection)
                self._servers.begin(connection)
        except BaseException:
            self._free()
            raise

    @property
    def is_shared(self) -> bool:
        """Whether other servers may use the same database."""
        return not self._is_sqlite

    def now(self) -> int:
        """The time, by the clock that the times of jobs are by."""
        return self._now()

    def close(self) -> None:
        """Jobs that this server still runs are at once the others'."""
        with suppress(DBAPIError), self._engine.begin() as connection:
            self._servers.end(connection)
        self._free()

    def _free(self) -> None:
        for lock in reversed(self._locks):
            lock.close()
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """A transaction that writes. Raises Unavailable if the locks were lost."""
        with self._writing:
            try:
                for lock in self._locks:
                    lock.ensure_held()
            except Unavailable as error:
                self._lost = error.message
                raise
            self._lost = None
            with self._engine.begin() as connection:
                yield connection

    @contextmanager
    def _snapshot(self) -> Iterator[Connection]:
        """A connection to read with. Raises Unavailable if the locks were lost."""
        if self._lost is not None:
            raise Unavailable(self._lost)
        with self._engine.connect() as connection:
            yield connection

    def recover(self) -> int:
        """At a start, put the jobs back into the queue that ran when the last process died, and
        those of other servers that have died.

        Returns how many. A job that was interrupted too often fails instead. No job may run yet.
        """
        with self._transaction() as connection:
            self._servers.begin(connection)
            if self._servers.is_only(connection):
                self._leave_future(connection)
        count = len(self.take_over())
        with self._snapshot() as connection:
            rows = connection.execute(select(jobs.c.id, jobs.c.run, jobs.c.status)).all()
        self._results.keep_only(_is_needed({row.id: row for row in rows}))
        return count

    def beat(self, state: State | None = None) -> list[str]:
        """Show the other servers that this one lives, and `take_over` the jobs of the dead. Every
        BEAT seconds, where the database is shared."""
        with self._engine.begin() as connection:
            self._database_clock.compare(connection)
            self._servers.beat(connection, state or State())
        return self.take_over()

    def take_over(self) -> list[str]:
        """Put the jobs of servers that have died back into the queue. Returns their ids."""
        with self._transaction() as connection:
            self._servers.bury(connection)
            gone = or_(jobs.c.server.is_(None), jobs.c.server.not_in(self._servers.living))
            return self._interrupt(connection, gone)

    def _leave_future(self, connection: Connection) -> None:
        """Take times that lie ahead as now: the clock was set back since the last process.

        Webhooks would have to wait, and results would be kept, until the clock is there again.
        """
        now = self._now()
        waiting = {"created": now, "expires": now + jobs.c.ttl}
        ended = {"finished": now, "delete_after": now + jobs.c.keep}
        ended |= {"webhook_due": case((jobs.c.webhook_due.is_not(None), now), else_=None)}
        unfinished = jobs.c.status.in_(UNFINISHED)
        connection.execute(update(jobs).where(jobs.c.created > now, unfinished).values(waiting))
        connection.execute(update(jobs).where(jobs.c.finished > now).values(ended))

    def requeue(self, running: Collection[str]) -> int:
        """Put all jobs that this server has IN_PROGRESS, except those `running`, back into the
        queue.

        Returns how many. A job that was interrupted too often fails instead.
        """
        lost = jobs.c.server == self._servers.own, jobs.c.id.not_in(running)
        with self._transaction() as connection:
            return len(self._interrupt(connection, and_(*lost)))

    def _interrupt(self, connection: Connection, lost: ColumnElement[bool]) -> list[str]:
        """Put the `lost` jobs that are IN_PROGRESS back into the queue. Returns their ids, without
        those that fail since they were interrupted too often."""
        found = select(jobs.c.number).where(lost, jobs.c.status == "IN_PROGRESS")
        these = jobs.c.number.in_(found.with_for_update(skip_locked=True))
        worn = jobs.c.interruptions >= MAX_INTERRUPTIONS - 1
        values = {"status": "IN_QUEUE", "started": None, "interruptions": jobs.c.interruptions + 1}
        failed = self._final("FAILED") | {
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

    def over(self, runs: Mapping[str, int]) -> list[str]:
        """Those of this server's `runs`, by the ids of their jobs, that have ended otherwise: the
        job was cancelled, or another server has taken it over."""
        if not runs:
            return []
        # What this server itself has just ended is not lost, though its work may seem to go on.
        own = jobs.c.server == self._servers.own, jobs.c.status.not_in(("IN_QUEUE", "CANCELLED"))
        found = select(jobs.c.id, jobs.c.run).where(jobs.c.id.in_(runs), *own)
        with self._snapshot() as connection:
            left = dict(connection.execute(found).tuples().all())
        return [job_id for job_id, run in runs.items() if left.get(job_id) != run]

    def add(self, new: NewJob, *, shared: bool = False) -> None:
        """Accept a job. Raises Overloaded if there are too many jobs or too many bytes of them.

        shared: whether several keys share the room.
        """
        now, size = self._now(), len(new.input)
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
        with self._transaction() as connection:
            if new.error is None or new.webhook:
                caller = Caller(new.key_name, shares=shared, address=new.address)
                self._check_room(connection, values["size"], caller)
            connection.execute(insert(jobs).values(values))
            if new.error is None:
                tell(connection, "queued")

    def _check_room(self, connection: Connection, size: int, caller: Caller) -> None:
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
        most, most_bytes = self._limits.max_unfinished, self._limits.max_bytes
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

    def get(self, job_id: str) -> Job | None:
        """The job, without its input; None if there is none, or its time is over, though it may not
        be deleted yet."""
        kept = or_(jobs.c.delete_after.is_(None), jobs.c.delete_after > self._now())
        with self._snapshot() as connection:
            row = connection.execute(select(*_SHOWN).where(jobs.c.id == job_id, kept)).one_or_none()
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
        now = self._now()
        values = {"status": "IN_PROGRESS", "started": now, "run": jobs.c.run + 1}
        values |= {"server": self._servers.own}
        claimed: list[Job] = []
        with self._transaction() as connection:
            self._servers.ensure_lease(connection)
            num_of, interruptions = self._running_here(connection, running or {}, made)
            turns = Turns(num_of, num_of.total() + limit, max_owners, shared, interruptions)
            queue = Queue(connection, now, self._servers.models_elsewhere(connection))
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
        own = jobs.c.status == "IN_PROGRESS", jobs.c.server == self._servers.own
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
            job, self._final("COMPLETED") | {"input": None, "size": len(result), "error": None}
        )
        if not ended:
            self._results.delete(job.id, job.run)
        return ended

    def fail(self, job: Job, error: str, status: Status = "FAILED") -> bool:
        """End a running job without a result.

        Returns False if it has ended in another way meanwhile.
        """
        return self._end_run(job, self._final(status) | {"error": error})

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
        self._end_where(jobs.c.id == job_id, UNFINISHED, self._final("CANCELLED"))
        job = self.get(job_id)
        # If the database was away, the result may have been written before the job was cancelled.
        if job is not None and job.status == "CANCELLED":
            self._results.delete(job.id, job.run)
        return job

    def purge(self, key_name: str | None = None, address: str | None = None) -> list[str]:
        """Cancel all jobs in the queue of that key; without one, of that address. Returns their
        ids."""
        mine = _is_of(key_name), jobs.c.address.is_not_distinct_from(address)
        return self._end_where(and_(*mine), ("IN_QUEUE",), self._final("CANCELLED"))

    def expire(self) -> list[str]:
        """End the jobs that have been in the queue for longer than their ttl. Returns their ids."""
        values = self._final("TIMED_OUT")
        values["error"] = "the job waited in the queue for longer than its ttl"
        return self._end_where(jobs.c.expires <= self._now(), ("IN_QUEUE",), values)

    def retry(self, job_id: str, *, shared: bool = False) -> bool:
        """Queue a failed or timed-out job again, with the same input.

        shared: as in `add`. Returns False if it is neither, or if its input is not kept: a bad one,
        or one with an s3Config. Raises Overloaded like `add`.
        """
        now = self._now()
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
        with self._transaction() as connection:
            found = connection.execute(select(jobs.c.key_name, jobs.c.address).where(*this)).all()
            if not found:
                return False
            caller = Caller(found[0].key_name, shares=shared, address=found[0].address)
            self._check_room(connection, 0, caller)
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
        with self._snapshot() as connection:
            found = dict(connection.execute(grouped).tuples().all())
            retries = connection.execute(retried).scalar_one()
        return Counts({status: found.get(status, 0) for status in get_args(Status)}, retries or 0)

    def totals(self) -> dict[Status, int]:
        """How many jobs of everybody there are, by status."""
        grouped = select(jobs.c.status, func.count()).group_by(jobs.c.status)
        with self._snapshot() as connection:
            found = dict(connection.execute(grouped).tuples().all())
        return {status: found.get(status, 0) for status in get_args(Status)}

    def listener(self, hear: Hear) -> Listener:
        """Hears what other servers tell."""
        return Listener(self._engine, hear)

    def workers(self, key_name: str | None = None) -> list[tuple[State, bool]]:
        """What the other servers tell of themselves, and whether they run jobs of that key."""
        mine = jobs.c.status == "IN_PROGRESS", _is_of(key_name)
        with self._snapshot() as connection:
            others = self._servers.others(connection)
            busy = {*connection.execute(select(jobs.c.server).where(*mine)).scalars()}
        return [(state, server in busy) for server, state in others.items()]

    def ask_for_events(self, job_id: str) -> None:
        """Let the server that runs a job move its events to where `take_events` finds them."""
        with self._transaction() as connection:
            tell(connection, "watched", job_id)

    def publish_events(self, job_id: str, messages: Collection[Message]) -> None:
        """Keep events of a job that runs here for `take_events`, on whichever server."""
        own = jobs.c.server == self._servers.own, jobs.c.status == "IN_PROGRESS"
        here = select(jobs.c.number).where(jobs.c.id == job_id, *own)
        values = [{"job": job_id, "body": json.dumps(message)} for message in messages]
        with self._transaction() as connection:
            if values and connection.execute(here).first() is not None:
                connection.execute(insert(events), values)
                tell(connection, "happened", job_id)

    def take_events(self, job_id: str) -> list[Message]:
        """The events that were published since they were last taken."""
        with self._transaction() as connection:
            query = delete(events).where(events.c.job == job_id).returning(*events.c)
            rows = sorted(connection.execute(query), key=lambda row: row.number)
        return [json.loads(row.body) for row in rows]

    def take_output(self, job: Job) -> bool:
        """Whether /stream is to send the output of this run: once, whichever server is asked."""
        this = jobs.c.id == job.id, jobs.c.run == job.run, jobs.c.status == "COMPLETED"
        sent = jobs.c.streamed.is_not_distinct_from(job.run)
        first = update(jobs).where(*this, not_(sent)).values(streamed=job.run)
        with self._transaction() as connection:
            return connection.execute(first).rowcount == 1

    def due_webhooks(self, limit: int, each: int, posting: Collection[str] = ()) -> list[Job]:
        """Finished jobs, up to `limit`, whose webhook is to be posted now, without their inputs.
        The caller is then responsible for posting them: other servers do not, while this one lives.

        Owners take turns, and of an owner's posts the hosts, so that many posts to a slow host do
        not hide those to others; of the posts to a host those go first that were made least often.

        each: of one owner's posts to a host, how many may be under way. posting: the jobs whose
        posts are, here; they count, as do those of other servers, and are not among the result.
        """
        others = jobs.c.webhook_server != self._servers.own
        elsewhere = and_(others, jobs.c.webhook_server.in_(self._servers.living))
        taken = or_(jobs.c.id.in_(posting), func.coalesce(elsewhere, False))
        chosen = webhooks_in_turn(self._now(), taken, each).limit(limit)
        with self._snapshot() as connection:
            numbers = list(connection.execute(chosen).scalars())
        if not numbers:
            return []
        still = jobs.c.webhook_due.is_not(None), not_(taken)
        free = select(jobs.c.number).where(jobs.c.number.in_(numbers), *still)
        these = jobs.c.number.in_(free.with_for_update(skip_locked=True))
        values = {"webhook_server": self._servers.own}
        with self._transaction() as connection:
            claimed = update(jobs).where(these).values(values).returning(*_SHOWN)
            found = {row.number: row for row in connection.execute(claimed)}
        return [Job.of(found[number]) for number in numbers if number in found]

    def note_webhook(self, job: Job, again_in: int | None) -> None:
        """Note that a webhook was posted: for the last time (None), or again in so many ms."""
        due = None if again_in is None else self._now() + again_in
        values = {"webhook_due": due, "webhook_posts": job.webhook_posts + 1}
        values |= {"webhook_server": None}
        # Not if the job was retried meanwhile: its next end has a post of its own.
        this = jobs.c.id == job.id, jobs.c.run == job.run, jobs.c.finished == job.finished
        with self._transaction() as connection:
            connection.execute(update(jobs).where(*this).values(values))

    def tidy(self) -> list[str]:
        """Delete finished jobs: those past their time, then the oldest beyond the limits.

        Jobs whose webhook is still to be posted stay, unless it has failed often and room is
        needed. Returns the ids of the deleted ones.
        """
        expired = (
            jobs.c.delete_after <= self._now(),
            jobs.c.status.not_in(UNFINISHED),
            jobs.c.webhook_due.is_(None),
        )
        with self._transaction() as connection:
            if not try_lock(connection, TIDY_LOCK):  # another server does it
                return []
            rows = connection.execute(select(jobs.c.id, jobs.c.run).where(*expired)).all()
            self._forget(connection, rows)
            excess = self._excess(connection)
            self._forget(connection, excess)
        for row in (*rows, *excess):
            self._results.delete(row.id, row.run)
        if self._is_sqlite:
            self._vacuum()
        return [row.id for row in (*rows, *excess)]

    def _excess(self, connection: Connection) -> list[Row[Any]]:
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
        excess = []
        while any(removable.values()):
            if counts.total() > self._limits.max_finished:
                most = counts
            elif sizes.total() > self._limits.max_bytes:
                most = sizes
            else:
                break
            owner = max((o for o, rows in removable.items() if rows), key=most.__getitem__)
            row = removable[owner].pop()
            counts[owner] -= 1
            sizes[owner] -= row.size
            excess.append(row)
        return excess

    def _forget(self, connection: Connection, rows: Iterable[Row[Any]]) -> None:
        for row in rows:
            connection.execute(delete(jobs).where(jobs.c.id == row.id))
            connection.execute(delete(events).where(events.c.job == row.id))

    def _vacuum(self) -> None:
        """Return free pages of SQLite's file to the file system.

        The pragma frees one page at each step of its statement; `execute` makes a single step,
        `executescript` makes all.
        """
        with self._writing, self._engine.connect() as connection:
            cursor = connection.connection.cursor()
            cursor.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
            cursor.close()

    def _final(self, status: Status) -> dict[str, Any]:
        """The columns of a job that ends now."""
        now = self._now()
        values: dict[str, Any] = {"status": status, "finished": now}
        values["delete_after"] = now + jobs.c.keep
        values["webhook_due"] = case((jobs.c.webhook.is_not(None), now), else_=None)
        values |= {"input": None, "size": 0, "s3_config": None}
        if status in RETRIABLE:  # keep the input, unless it needs credentials, which are not kept
            kept = jobs.c.s3_config.is_(None)
            values["input"] = case((kept, jobs.c.input), else_=None)
            values["size"] = case((kept, jobs.c.size), else_=0)
        return values

    def _end_run(self, job: Job, values: dict[str, Any]) -> bool:
        """End this run of the job. Returns whether it has ended like this.

        That is also so if a call before did it, whose answer was lost with the connection.
        """
        this = jobs.c.id == job.id, jobs.c.run == job.run, jobs.c.server == job.server
        end = update(jobs).where(*this, jobs.c.status == "IN_PROGRESS").values(values)
        same = select(jobs.c.id).where(*this, jobs.c.status == values["status"])
        with self._transaction() as connection:
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
        with self._transaction() as connection:
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
