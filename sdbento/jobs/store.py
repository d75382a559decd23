r"""Jobs that outlive the process: rows in a database, results in files.

    IN_QUEUE --> IN_PROGRESS --> COMPLETED, FAILED, TIMED_OUT, CANCELLED
       |  ^___________|  release, or a new start of the server
       \--> CANCELLED, TIMED_OUT

Every change of status is one UPDATE that names the status which it starts from; the end of a run
names the run as well. So if two callers want to end a job, one of them does and the other learns
that it did not. A result is a whole file on the disk before its row says COMPLETED. The SQL is
portable; the database is SQLite unless another one is named. Only one server may use a folder and a
database at a time: at its start every job that is IN_PROGRESS must have died with the last process.

Lock order: the locks on folder and database, held for the life of the store, then `_writing`, held
for one transaction. Everything blocks and is thread-safe. Knows nothing of HTTP, of the App and of
what a job computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, get_args

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from sdbento.access.caller import Caller
from sdbento.access.limits import has_place, refusal
from sdbento.errors import NotFound, Unavailable
from sdbento.jobs.database import connect, make_tables
from sdbento.jobs.locks import DatabaseLock, LockFile, lock_database, lock_folder
from sdbento.jobs.results import Results
from sdbento.jobs.table import (
    RETRIABLE,
    UNFINISHED,
    Job,
    NewJob,
    Status,
    jobs,
    metadata,
    milliseconds,
    owner_of_job,
)

SUSPECT_INTERRUPTIONS = 3  # deaths of the server during a job after which the job is run alone
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
    """The jobs of one server. `close` it at the end.

    folder: for results and the lock; created if it is missing.
    url: of the database, as SQLAlchemy writes it; None: SQLite in the folder.
    Raises Unavailable if another server has the folder or the database.
    """

    def __init__(
        self,
        folder: Path,
        url: str | None = None,
        *,
        limits: Limits | None = None,
        clock: Callable[[], int] = milliseconds,
    ) -> None:
        self._limits = limits or Limits()
        self._now = clock
        self._writing = Lock()
        self._results = Results(folder / "results")
        self._engine = connect(url, folder)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        self._lost: str | None = None  # why this server no longer has its locks, if so
        self._locks: list[LockFile | DatabaseLock] = [lock_folder(folder)]
        try:
            if url is not None and (lock := lock_database(self._engine)) is not None:
                self._locks.append(lock)
            make_tables(self._engine, metadata)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for lock in reversed(self._locks):
            lock.close()
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """A transaction that writes; one at a time. Raises Unavailable if the locks were lost."""
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
        """At a start, put the jobs back into the queue that ran when the last process died.

        Returns how many. A job that was interrupted too often fails instead. No job may run yet.
        """
        self._leave_future()
        count = self.requeue(running=())
        run = case((jobs.c.status == "COMPLETED", jobs.c.run), else_=None)
        with self._snapshot() as connection:
            runs = dict(connection.execute(select(jobs.c.id, run)).tuples().all())
        self._results.keep_only(runs)
        return count

    def _leave_future(self) -> None:
        """Take times that lie ahead as now: the clock was set back since the last process.

        Webhooks would have to wait, and results would be kept, until the clock is there again.
        """
        now = self._now()
        waiting = {"created": now, "expires": now + jobs.c.ttl}
        ended = {"finished": now, "delete_after": now + jobs.c.keep}
        ended |= {"webhook_due": case((jobs.c.webhook_due.is_not(None), now), else_=None)}
        unfinished = jobs.c.status.in_(UNFINISHED)
        with self._transaction() as connection:
            connection.execute(update(jobs).where(jobs.c.created > now, unfinished).values(waiting))
            connection.execute(update(jobs).where(jobs.c.finished > now).values(ended))

    def requeue(self, running: Collection[str]) -> int:
        """Put all jobs that are IN_PROGRESS, except those `running`, back into the queue.

        Returns how many. A job that was interrupted too often fails instead.
        """
        lost = jobs.c.status == "IN_PROGRESS", jobs.c.id.not_in(running)
        values = {"status": "IN_QUEUE", "started": None, "interruptions": jobs.c.interruptions + 1}
        failed = self._final("FAILED") | {
            "error": f"the server died {MAX_INTERRUPTIONS} times while it ran this job; it is not "
            "run again"
        }
        with self._transaction() as connection:
            worn = jobs.c.interruptions >= MAX_INTERRUPTIONS - 1
            connection.execute(update(jobs).where(*lost, worn).values(failed))
            return connection.execute(update(jobs).where(*lost).values(values)).rowcount

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

    def _check_room(self, connection: Connection, size: int, caller: Caller) -> None:
        """Raises Overloaded if a job of so many bytes has no room among the unfinished ones. Those
        whose webhook has not had its first posts take a place as well: they must be kept."""
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
        claimed: list[Job] = []
        with self._transaction() as connection:
            num_of = self._num_running(connection, running or {}, made)
            num_running = num_of.total()
            places = num_running + limit
            interruptions = connection.execute(_MOST_INTERRUPTIONS).scalar_one()
            each = max(1, limit)
            for row in _in_turn(connection.execute(_next_of_each(now, each, except_of)), num_of):
                interruptions = max(interruptions, row.interruptions)
                if interruptions >= SUSPECT_INTERRUPTIONS and num_running:
                    break
                caller = Caller(row.key_name, shares=shared, address=row.address)
                is_first = row.owner not in num_of and len(num_of) < max_owners
                if not is_first and not has_place(caller, num_of, places):
                    continue
                values = {"status": "IN_PROGRESS", "started": now, "run": jobs.c.run + 1}
                this = jobs.c.number == row.number
                waiting = jobs.c.status == "IN_QUEUE"
                if connection.execute(update(jobs).where(this, waiting).values(values)).rowcount:
                    claimed.append(Job.of(connection.execute(select(jobs).where(this)).one()))
                    num_of[row.owner] += 1
                    num_running += 1
        return claimed

    def _num_running(
        self, connection: Connection, running: Mapping[str, str | None], made: Collection[str]
    ) -> Counter[str | None]:
        """How many jobs of each owner are `running`, or IN_PROGRESS and not `made`."""
        others = jobs.c.status == "IN_PROGRESS", jobs.c.id.not_in([*running, *made])
        owners = connection.execute(select(owner_of_job).where(*others)).scalars()
        return Counter([*running.values(), *owners])

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
            return connection.execute(update(jobs).where(*this).values(values)).rowcount == 1

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

    def due_webhooks(self, limit: int, each: int, posting: Collection[str] = ()) -> list[Job]:
        """Finished jobs, up to `limit`, whose webhook is to be posted now, without their inputs.

        Owners take turns, and of an owner's posts the hosts, so that many posts to a slow host do
        not hide those to others; of the posts to a host those go first that were made least often.

        each: of one owner's posts to a host, how many may be under way. posting: the jobs whose
        posts are; they count, and are not among the result.
        """
        chosen = _webhooks_in_turn(self._now(), posting, each).limit(limit).subquery()
        query = select(*_SHOWN).join(chosen, jobs.c.number == chosen.c.number)
        with self._snapshot() as connection:
            rows = connection.execute(query.order_by(chosen.c.place, jobs.c.webhook_due))
            return [Job.of(row) for row in rows]

    def note_webhook(self, job: Job, again_in: int | None) -> None:
        """Note that a webhook was posted: for the last time (None), or again in so many ms."""
        due = None if again_in is None else self._now() + again_in
        values = {"webhook_due": due, "webhook_posts": job.webhook_posts + 1}
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
        this = jobs.c.id == job.id, jobs.c.run == job.run
        end = update(jobs).where(*this, jobs.c.status == "IN_PROGRESS").values(values)
        same = select(jobs.c.id).where(*this, jobs.c.status == values["status"])
        with self._transaction() as connection:
            return connection.execute(end).rowcount == 1 or bool(connection.execute(same).all())

    def _end_where(
        self, condition: Any, statuses: tuple[Status, ...], values: dict[str, Any]
    ) -> list[str]:
        """Change all jobs that meet `condition` and have one of `statuses`. Returns their ids."""
        ended = []
        with self._transaction() as connection:
            found = select(jobs.c.id).where(condition, jobs.c.status.in_(statuses))
            for job_id in connection.execute(found).scalars().all():
                this = jobs.c.id == job_id, jobs.c.status.in_(statuses)
                if connection.execute(update(jobs).where(*this).values(values)).rowcount:
                    ended.append(job_id)
        return ended


_MOST_INTERRUPTIONS = select(func.coalesce(func.max(jobs.c.interruptions), 0)).where(
    jobs.c.status == "IN_PROGRESS"
)


def _lost(job: Job) -> NotFound:
    return NotFound(f"the result of job {job.id} is no longer there", param="id")


def _is_of(key_name: str | None) -> ColumnElement[bool]:
    return jobs.c.key_name.is_not_distinct_from(key_name)


def _next_of_each(now: int, limit: int, except_of: Collection[str]) -> Select[Any]:
    """The first `limit` jobs of each owner that can be run, with their `place` among its jobs."""
    first = jobs.c.low_priority, jobs.c.number
    place = func.row_number().over(partition_by=owner_of_job, order_by=first).label("place")
    waiting = (
        select(owner_of_job, jobs.c.key_name, jobs.c.address, jobs.c.interruptions, *first, place)
        .where(jobs.c.status == "IN_QUEUE", jobs.c.expires > now)
        .where(or_(owner_of_job.is_(None), owner_of_job.not_in(except_of)))
        .subquery()
    )
    return select(waiting).where(waiting.c.place <= limit)


def _webhooks_in_turn(now: int, posting: Collection[str], each: int) -> Select[Any]:
    """The numbers of jobs with a webhook that is due and not under way, each with its `place` among
    those of its owner."""
    is_new = case((jobs.c.id.in_(posting), 0), else_=1).label("is_new")
    first = is_new, jobs.c.webhook_posts, jobs.c.webhook_due, jobs.c.number
    host = owner_of_job, jobs.c.webhook_host
    at_host = func.row_number().over(partition_by=host, order_by=first).label("at_host")
    due = select(owner_of_job, *first, at_host).where(jobs.c.webhook_due <= now).subquery()
    turn = due.c.is_new, due.c.at_host, due.c.webhook_posts, due.c.webhook_due
    place = func.row_number().over(partition_by=due.c.owner, order_by=turn).label("place")
    allowed = select(due.c.number, due.c.is_new, place).where(due.c.at_host <= each).subquery()
    return (
        select(allowed.c.number, allowed.c.place)
        .where(allowed.c.is_new == 1)
        .order_by(allowed.c.place, allowed.c.number)
    )


def _in_turn(rows: Iterable[Row[Any]], num_running: Counter[str | None]) -> list[Row[Any]]:
    """The order in which these jobs are run: those go first whose owner has fewer jobs before them,
    running ones included. So a low priority puts a job behind others of its owner only."""
    return sorted(
        rows, key=lambda row: (num_running[row.owner] + row.place, row.low_priority, row.number)
    )
