"""Passes the events of jobs that run here on to the servers where clients ask for them.

Events are in the memory of the server that runs a job. While somebody asks another server for them,
they are moved to the database, from where any server takes them. They may get lost, as when the
database is away: progress is not a result.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from sdbento.background import ThreadPool, start_task
from sdbento.jobs.progress import ProgressOfJobs

if TYPE_CHECKING:
    from sdbento.jobs.store.job_store import JobStore

log = logging.getLogger(__name__)

WATCHED_SECONDS = 60.0  # after a client has asked another server for a job's events
PAUSE = 0.25  # seconds between two moves of events to the database


class Relay:
    """`watch` a job for a while; `flush` it before it ends. All on one event loop."""

    def __init__(self, store: JobStore, threads: ThreadPool, progress: ProgressOfJobs) -> None:
        self._store = store
        self._threads = threads
        self._progress = progress
        self._until: dict[str, float] = {}  # by job: time.monotonic() until which it is watched
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def watch(self, job_id: str) -> None:
        """A client of another server wants the events of a job that runs here."""
        self._until[job_id] = time.monotonic() + WATCHED_SECONDS
        if job_id not in self._tasks:
            task = start_task(self._pass_on(job_id), f"sdbento events of job {job_id}")
            self._tasks[job_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(job_id, None))

    async def flush(self, job_id: str) -> None:
        """Move what has happened so far, if anybody watches."""
        progress = self._progress.find(job_id)
        if job_id not in self._until or progress is None or not progress:
            return
        try:
            await self._threads.run(self._store.events.publish, job_id, progress.take_all())
        except Exception as exc:
            log.warning("events of job %s are lost: %s", job_id, type(exc).__name__)

    def forget(self, job_id: str) -> None:
        """The job has ended, here at least."""
        self._until.pop(job_id, None)

    async def _pass_on(self, job_id: str) -> None:
        while time.monotonic() < self._until.get(job_id, 0.0):
            await self.flush(job_id)
            await asyncio.sleep(PAUSE)
        self.forget(job_id)
