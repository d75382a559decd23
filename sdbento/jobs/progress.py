"""Events of jobs that nobody has asked for yet: what /stream answers, in memory.

Bounded, and lost with the process: progress is not a result.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from typing import Any

from cachetools import LRUCache

MAX_EVENTS = 5000  # of one job; 16 images of 150 steps have fewer
MAX_JOBS = 512  # beyond them, the jobs that were looked at or changed longest ago are forgotten

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

    def __init__(self) -> None:
        super().__init__(newest_only=["preview"])
        self.output_sent = False  # whether the event with the job's output was taken


class ProgressOfJobs:
    """The progress of every job that has any."""

    def __init__(self) -> None:
        self._jobs: LRUCache[str, JobProgress] = LRUCache(MAX_JOBS)

    def of(self, job_id: str) -> JobProgress:
        progress = self._jobs.get(job_id)
        if progress is None:
            progress = self._jobs[job_id] = JobProgress()
        return progress

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
