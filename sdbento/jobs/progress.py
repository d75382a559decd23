"""What happened to jobs that nobody has asked about yet: the events of /stream, in memory.

Bounded, and lost with the process: progress is not a result.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from typing import Any

MAX_EVENTS = 5000  # of a job; 16 images of 150 steps have fewer
MAX_JOBS = 512  # those that were looked at or changed least recently are forgotten

Event = dict[str, Any]


class Progress:
    """The events of one job since they were last taken.

    A newer preview of an image replaces the one that waits: previews are large.
    """

    def __init__(self) -> None:
        self.told = False  # whether its output was among them
        self.changed = asyncio.Event()  # there are some, or the job has ended
        self._events: dict[object, Event] = {}
        self._numbers = itertools.count()

    def push(self, event: Event) -> None:
        is_preview = event["event"] == "preview"
        key = ("preview", event["image"]) if is_preview else next(self._numbers)
        self._events.pop(key, None)
        self._events[key] = event
        if len(self._events) > MAX_EVENTS:
            del self._events[next(iter(self._events))]
        self.changed.set()

    def take(self) -> list[Event]:
        taken = list(self._events.values())
        self._events.clear()
        self.changed.clear()
        return taken


class ProgressOfAll:
    """The progress of every job that has any."""

    def __init__(self) -> None:
        self._jobs: dict[str, Progress] = {}

    def of(self, job_id: str) -> Progress:
        progress = self._jobs.pop(job_id, None) or Progress()
        self._jobs[job_id] = progress
        if len(self._jobs) > MAX_JOBS:
            del self._jobs[next(iter(self._jobs))]
        return progress

    def wake(self, job_id: str) -> None:
        """Let those look who wait for a job's events."""
        if job_id in self._jobs:
            self._jobs[job_id].changed.set()

    def wake_all(self) -> None:
        for job_id in self._jobs:
            self.wake(job_id)

    def forget(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            self._jobs.pop(job_id, None)
