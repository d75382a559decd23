"""Jobs for tests of the store, and a clock that the tests set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sqlalchemy import select

from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.table import Job, NewJob, jobs

HOUR = 3_600_000  # ms


class Clock:
    """The time in milliseconds, which stands still until a test changes `now`."""

    def __init__(self) -> None:
        self.now = 1_000_000

    def __call__(self) -> int:
        return self.now


def new(job_id: str = "a", *, input: str = "{}", **options: Any) -> NewJob:
    job = NewJob(job_id, input, keep=HOUR, ttl=10 * HOUR, execution_timeout=600_000)
    return replace(job, **options)


def add_and_claim(store: JobStore, job_id: str = "a", **options: Any) -> Job:
    """Add a job and claim it; no other may be waiting."""
    store.add(new(job_id, **options))
    (job,) = store.claim(1)
    return job


def current(store: JobStore, job_id: str = "a") -> Job:
    """The job as the store has it now."""
    job = store.get(job_id)
    assert job is not None
    return job


def kept_to_run(store: JobStore, job_id: str = "a") -> tuple[str | None, str | None]:
    """Input and bucket of a job as they lie in the database; `current` does not read them."""
    query = select(jobs.c.input, jobs.c.s3_config).where(jobs.c.id == job_id)
    with store._database.engine.connect() as connection:
        kept, bucket = connection.execute(query).one()
    return kept, bucket
