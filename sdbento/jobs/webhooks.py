"""Tells the webhooks of finished jobs, until they have heard it or will not.

What is still to be told is in the store: a webhook is posted at least once, also when the server is
killed meanwhile. Knows nothing of how jobs are run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

from sdbento.errors import classify, unexplained
from sdbento.jobs.format import status_body
from sdbento.jobs.retry import insist
from sdbento.jobs.store import JobStore
from sdbento.jobs.table import Job
from sdbento.outbound import post
from sdbento.settings import Settings

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

RETRIES = 2
PAUSE = 10.0  # seconds before each of them
POSTERS = 8  # webhooks that may be slow at once
TICK = 1.0  # seconds; what waits for its retry has no other alarm


class Webhooks:
    """`run` it as a task; `wake` it when a job ends."""

    def __init__(self, store: JobStore, settings: Settings, pause: float = PAUSE) -> None:
        self._store = store
        self._settings = settings
        self._pause = pause
        self._news = asyncio.Event()
        self._posting: dict[str, asyncio.Task[None]] = {}
        self._threads = ThreadPoolExecutor(POSTERS, thread_name_prefix="sdbento-webhook")
        self._bookkeeper = ThreadPoolExecutor(1, thread_name_prefix="sdbento-webhook-store")

    def wake(self) -> None:
        self._news.set()

    async def run(self) -> None:
        """Post what is due, for ever; when cancelled, what is under way is told again later."""
        try:
            while True:
                self._news.clear()
                await self._start_due()
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(TICK, self._pause)):
                        await self._news.wait()
        finally:
            for task in self._posting.values():
                task.cancel()
            self._threads.shutdown(wait=False, cancel_futures=True)
            # The store is closed next; hosts may take their time, and are told again.
            await asyncio.to_thread(self._bookkeeper.shutdown, cancel_futures=True)

    async def _start_due(self) -> None:
        free = POSTERS - len(self._posting)
        if not free:
            return
        try:
            # Those under way are due as well, and come first.
            due = await self._ask(self._store.due_webhooks, POSTERS)
        except Exception as exc:
            reason = classify(exc).message
            log.error("due webhooks cannot be read: %s", reason, exc_info=unexplained(exc))
            return
        for job in [job for job in due if job.id not in self._posting][:free]:
            task = asyncio.create_task(self._tell(job))
            self._posting[job.id] = task
            task.add_done_callback(partial(self._ended, job.id))

    def _ended(self, job_id: str, _: asyncio.Task[None]) -> None:
        del self._posting[job_id]
        self._news.set()

    async def _tell(self, job: Job) -> None:
        loop = asyncio.get_running_loop()
        try:
            heard = await loop.run_in_executor(self._threads, self._post, job)
            final = heard or job.webhook_failures >= RETRIES
            again_in = None if final else round(self._pause * 1000)
            # Until it is noted this task is the one that posts the job, and it has.
            await insist(
                lambda: self._ask(self._store.note_webhook, job, again_in),
                f"that the webhook of job {job.id} was posted",
            )
        except Exception as exc:
            reason = classify(exc).message
            log.error("the webhook of job %s: %s", job.id, reason, exc_info=unexplained(exc))
            await asyncio.sleep(TICK)

    async def _ask(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._bookkeeper, partial(function, *args, **kwargs))

    def _post(self, job: Job) -> bool:
        """Blocking."""
        assert job.webhook is not None
        try:
            body = status_body(job, self._store.output(job))
            post(job.webhook, body, self._settings, param="webhook")
        except Exception as exc:
            log.warning("job %s: %s", job.id, classify(exc).message)
            return False
        return True
