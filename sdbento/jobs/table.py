"""The tables of jobs and of the servers that run them, for any database.

Times are in milliseconds since the epoch, so that they mean the same to other processes; durations
are in milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    func,
    literal_column,
)

Status = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]

SYNC_PREFIX = "sync-"  # of the ids of /runsync jobs, here and on RunPod
UNFINISHED: tuple[Status, ...] = ("IN_QUEUE", "IN_PROGRESS")
RETRIABLE: tuple[Status, ...] = ("FAILED", "TIMED_OUT")

# On Linux CLOCK_MONOTONIC stands still while the machine sleeps.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_EPOCH = time.time_ns() - time.clock_gettime_ns(_CLOCK)  # when that clock was at 0

metadata = MetaData()
jobs = Table(
    "jobs",
    metadata,
    # The order of the queue. In SQLite only an INTEGER is numbered automatically.
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("id", String(80), nullable=False, unique=True),
    Column("status", String(12), nullable=False),
    Column("input", Text),  # JSON; None: no longer needed
    Column("low_priority", Integer, nullable=False),  # 0 or 1
    Column("run", Integer, nullable=False),  # how often it was started
    Column("retries", Integer, nullable=False),  # how often a client has asked for it again
    Column("interruptions", Integer, nullable=False),  # how many runs died with the server
    Column("size", BigInteger, nullable=False),  # bytes of input and result
    Column("created", BigInteger, nullable=False),
    Column("started", BigInteger),
    Column("finished", BigInteger),
    Column("expires", BigInteger, nullable=False),  # when it must have ended, by its ttl
    Column("delete_after", BigInteger),  # set when it ends
    Column("ttl", BigInteger, nullable=False),
    Column("execution_timeout", BigInteger, nullable=False),
    Column("keep", BigInteger, nullable=False),
    Column("error", Text),
    Column("webhook", Text),
    Column("webhook_host", String(255)),  # None: there is no webhook, or an old version stored it
    # How often its webhook was posted. Called webhook_failures in the databases that exist.
    Column("webhook_failures", Integer, key="webhook_posts", nullable=False),
    Column("webhook_due", BigInteger, index=True),  # None: nothing to post
    # JSON: the client's bucket with its credentials; None: it names none, or the job has ended.
    Column("s3_config", Text),
    # The name of the key that asked for it; None: no key. Called owner in the databases that exist.
    Column("owner", String(80), key="key_name"),
    Column("address", String(80)),  # of the client that asked for it, where there was no key
    Column("traceparent", String(80)),  # of the request that asked for it, if it was traced
    # Who runs it, or ran it last. Only a server that lives holds a job IN_PROGRESS.
    Column("server", String(32)),
    Column("webhook_server", String(32)),  # who posts its webhook
    Column("streamed", Integer),  # the run whose output /stream has sent
    Column("model", String(255)),  # that it needs, by its name; None: nobody knows
)
# As `Job.owner`, in a query; and, for the index, with "" for None.
owner_of_job = func.coalesce(jobs.c.key_name, jobs.c.address).label("owner")
queue_owner = func.coalesce(jobs.c.key_name, jobs.c.address, literal_column("''"))
Index("jobs_in_turn", jobs.c.status, queue_owner, jobs.c.low_priority, jobs.c.number)
is_waiting = jobs.c.status == "IN_QUEUE"
Index("jobs_by_expiry", jobs.c.expires, postgresql_where=is_waiting, sqlite_where=is_waiting)
# Columns that are read only to run the job: an input may have many megabytes.
TO_RUN = ("input", "s3_config")
SHOWN = [column for column in jobs.c if column.key not in TO_RUN]
servers = Table(
    "servers",
    metadata,
    Column("id", String(32), primary_key=True),  # a new one at every start
    Column("until", BigInteger, nullable=False),  # its lease, by the clock of the database
    Column("alive", Integer, nullable=False),  # 0: it must be replaced
    Column("ready", Integer, nullable=False),  # 1: it has loaded its default model
    Column("models", Text, nullable=False),  # JSON: the names of those in its memory
    Column("results", String(32), nullable=False),  # where it keeps results: `Results.place`
)
# Events of jobs on their way to clients of other servers than those that run them.
events = Table(
    "events",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("job", String(80), nullable=False, index=True),
    Column("body", Text, nullable=False),  # JSON
)


def route_of(job_id: str) -> str:
    """The route by which a job was asked for."""
    return "/runsync" if job_id.startswith(SYNC_PREFIX) else "/run"


@dataclass(frozen=True)
class NewJob:
    """A job to be stored. Durations in ms. With an `error`, its input is bad and it has failed."""

    id: str
    input: str
    keep: int  # how long it is kept after its end
    ttl: int  # for the time in the queue and the run together
    execution_timeout: int
    low_priority: bool = False
    webhook: str | None = None
    webhook_host: str | None = None
    error: str | None = None
    s3_config: str | None = field(default=None, repr=False)
    key_name: str | None = None  # the name of the key that asks for it
    address: str | None = None  # where it is asked for, if there is no key
    traceparent: str | None = None  # of the request that asks for it, if it is traced
    model: str | None = None  # that it needs; None: nobody knows


@dataclass(frozen=True)
class Job:
    """A stored job, as its row was when it was read. Columns that were not read are None."""

    id: str
    status: Status
    input: str | None
    run: int
    created: int
    started: int | None
    finished: int | None
    expires: int
    ttl: int
    execution_timeout: int
    size: int
    error: str | None
    webhook: str | None
    webhook_posts: int
    delete_after: int | None
    s3_config: str | None = field(repr=False)
    key_name: str | None
    address: str | None
    traceparent: str | None = None
    server: str | None = None
    streamed: int | None = None

    @classmethod
    def of(cls, row: Row[Any]) -> Job:
        read: Mapping[Any, Any] = row._mapping
        values: dict[str, Any] = {n: read.get(jobs.c[n]) for n in cls.__dataclass_fields__}
        return cls(**values)

    @property
    def owner(self) -> str | None:
        """For whom shares are counted and turns are taken: the key, or the address without one."""
        return self.address if self.key_name is None else self.key_name

    @property
    def unfinished(self) -> bool:
        return self.status in UNFINISHED

    @property
    def delay(self) -> int | None:
        """Milliseconds from its acceptance to its start, or to its end if it was never started."""
        until = self.started if self.started is not None else self.finished
        return None if until is None else max(0, until - self.created)

    @property
    def execution(self) -> int | None:
        """Milliseconds from its start to its end; 0 if it was never started."""
        if self.finished is None:
            return None
        return 0 if self.started is None else max(0, self.finished - self.started)


def milliseconds() -> int:
    """The time now, in milliseconds since the epoch, if the clock was right when we started.

    Later steps of the clock do not change it: a clock that is set forward would end all jobs that
    wait, one that is set back would keep results and hold up webhooks. It goes on while the machine
    sleeps.
    """
    return (_EPOCH + time.clock_gettime_ns(_CLOCK)) // 1_000_000
