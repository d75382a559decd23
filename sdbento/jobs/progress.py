"""Events of jobs that nobody has asked for yet: what /stream answers, in memory.

Bounded, and lost with the process: progress is not a result.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

from sdbento.jobs.table import Job

MAX_EVENTS = 5000  # of one job; 16 images of 150 steps have fewer
MAX_JOBS = 512  # beyond them, jobs of whoever has most of them are forgotten

Message = dict[str, Any]  # an event as JSON, named by its "event"


class EventBuffer:
    """Events in the order in which they came, until they are taken. Not thread-safe.

    newest_only: kinds of events (step, preview, ...) of which only the newest of each image waits:
    it replaces an older one and goes to the end. None: every kind is like that.
    """

    def __init__(self, newest_only: Iterable[str] | None = None) -> None:
        self.changed = asyncio.Event()  # set when there is something to take
        self._newest_only = None if newest_only is None else frozenset(newest_only)
        self._events: dict[object, Message] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._events)

    def push(self, message: Message) -> None:
        key = self._key(message)
        self._events.pop(key, None)
        self._events[key] = message
        if len(self._events) > MAX_EVENTS:
            self.take_oldest()
        self.changed.set()

    def take_oldest(self) -> Message:
        """Remove and return the event that has waited longest. There must be one."""
        return self._events.pop(next(iter(self._events)))

    def take_all(self) -> list[Message]:
        taken = list(self._events.values())
        self._events.clear()
        self.changed.clear()
        return taken

    def _key(self, message: Message) -> object:
        kind = message["event"]
        if self._newest_only is None or kind in self._newest_only:
            return kind, message.get("image")
        return next(self._numbers)


class JobProgress(EventBuffer):
    """The events of one job since they were last taken.

    Of the previews of an image only the newest waits, because they are large.
    """

    def __init__(self, owner: str | None = None) -> None:
        super().__init__(newest_only=["preview"])
        self.owner = owner


class ProgressOfJobs:
    """The progress of every job that has any."""

    def __init__(self) -> None:
        self._jobs: dict[str, JobProgress] = {}  # looked at or changed longest ago first

    def of(self, job: Job) -> JobProgress:
        progress = self._jobs.pop(job.id, None)
        if progress is None:
            progress = JobProgress(job.owner)
        self._jobs[job.id] = progress
        if len(self._jobs) > MAX_JOBS:
            self._forget_one()
        return progress

    def find(self, job_id: str) -> JobProgress | None:
        """The progress of a job that has some."""
        return self._jobs.get(job_id)

    def _forget_one(self) -> None:
        """Forget the oldest progress of the owner who has most, so that nobody drives out
        another's."""
        num_jobs = Counter(progress.owner for progress in self._jobs.values())
        most = max(num_jobs, key=num_jobs.__getitem__)
        del self._jobs[next(id for id, kept in self._jobs.items() if kept.owner == most)]

    def wake(self, job_id: str) -> None:
        """Let requests that wait for a job's events look again, as when the job has ended."""
        if (progress := self._jobs.get(job_id)) is not None:
            progress.changed.set()

    def wake_all(self) -> None:
        for job_id in list(self._jobs):
            self.wake(job_id)

    def forget(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            self._jobs.pop(job_id, None)
