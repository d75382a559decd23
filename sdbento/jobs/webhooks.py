"""Posts finished jobs to their webhooks until they accept it or have refused it too often.

The store knows which posts are due, so that every webhook is posted at least once even if the
server is killed. Knows nothing of how jobs are run.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial

from sdbento.background import ThreadPool, start_task
from sdbento.errors import classify, unexplained
from sdbento.jobs.retry import retry_while_refused
from sdbento.jobs.runpod_format import status_body
from sdbento.jobs.store import JobStore
from sdbento.jobs.table import Job
from sdbento.outbound import post
from sdbento.settings import Settings

log = logging.getLogger(__name__)

MAX_RETRIES = 2
RETRY_SECONDS = 10.0  # before each retry; RunPod's number, like MAX_RETRIES
MAX_POSTS = 8  # at once: hosts may be slow
POLL_SECONDS = 1.0  # between two searches for posts that are due


class Webhooks:
    """`run` it as a task; `wake` it when a job ends."""

    def __init__(
        self, store: JobStore, settings: Settings, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        self._store = store
        self._settings = settings
        self._retry_seconds = retry_seconds
        self._awake = asyncio.Event()  # a post may be due, or there is room for one
        self._posting: dict[str, asyncio.Task[None]] = {}  # by the job's id
        self._post_threads = ThreadPool(MAX_POSTS, "sdbento-webhook")
        self._store_thread = ThreadPool(1, "sdbento-webhook-store")

    def wake(self) -> None:
        self._awake.set()

    async def run(self) -> None:
        """Post what is due, for ever. If this is cancelled, open posts are made again later."""
        try:
            while True:
                self._awake.clear()
                await self._start_due()
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(POLL_SECONDS, self._retry_seconds)):
                        await self._awake.wait()
        finally:
            for task in self._posting.values():
                task.cancel()
            self._post_threads.shutdown(wait=False, cancel_futures=True)
            # Wait for this one: the store is closed next.
            await asyncio.to_thread(self._store_thread.shutdown, cancel_futures=True)

    async def _start_due(self) -> None:
        free = MAX_POSTS - len(self._posting)
        if not free:
            return
        try:
            # Posts that are under way are due as well, and are listed first.
            due = await self._store_thread.run(self._store.due_webhooks, MAX_POSTS)
        except Exception as exc:
            reason = classify(exc).message
            log.error("due webhooks cannot be read: %s", reason, exc_info=unexplained(exc))
            return
        for job in [job for job in due if job.id not in self._posting][:free]:
            task = start_task(self._post_and_note(job), f"sdbento webhook of job {job.id}")
            self._posting[job.id] = task
            task.add_done_callback(partial(self._post_ended, job.id))

    def _post_ended(self, job_id: str, _: asyncio.Task[None]) -> None:
        del self._posting[job_id]
        self.wake()

    async def _post_and_note(self, job: Job) -> None:
        try:
            accepted = await self._post_threads.run(self._post, job)
            final = accepted or job.webhook_posts >= MAX_RETRIES
            again_in = None if final else round(self._retry_seconds * 1000)
            # The job is not posted again meanwhile: this task counts as its post until it ends.
            await retry_while_refused(
                lambda: self._store_thread.run(self._store.note_webhook, job, again_in),
                f"that the webhook of job {job.id} was posted cannot be kept",
            )
        except Exception as exc:
            reason = classify(exc).message
            log.error("the webhook of job %s: %s", job.id, reason, exc_info=unexplained(exc))
            await asyncio.sleep(POLL_SECONDS)  # the post is still due: do not repeat it at once

    def _post(self, job: Job) -> bool:
        """Whether the webhook accepted the job. Blocking."""
        assert job.webhook is not None
        try:
            body = status_body(job, self._store.result(job))
            post(job.webhook, body, self._settings, param="webhook")
        except Exception as exc:
            log.warning("job %s: %s", job.id, classify(exc).message)
            return False
        return True
