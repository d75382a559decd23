"""Posts finished jobs to their webhooks until they accept it, or the job is kept no longer.

Posts are signed by the scheme of standardwebhooks.com if there is a key for it. The store knows
which posts are due, so that every webhook is posted at least once even if the server is killed.
Knows nothing of how jobs are run.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from urllib.parse import urlsplit

from opentelemetry.trace import SpanKind
from standardwebhooks import Webhook

from sdbento.access.caller import Caller, acting_for
from sdbento.access.limits import Places, with_reserve
from sdbento.background import Problem, ThreadPool, start_task
from sdbento.errors import classify, unexplained
from sdbento.jobs.retry import retry_while_refused
from sdbento.jobs.runpod_format import around_result, status_body
from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.table import Job
from sdbento.metrics.definitions import webhooks_total
from sdbento.outbound.http import Answer, Body, Outbound
from sdbento.settings import Settings
from sdbento.telemetry import spans

log = logging.getLogger(__name__)

# Seconds before each retry; the last one is repeated.
PAUSES = (10.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0)
RUNPODS_RETRIES = 2  # the first two are RunPod's own, made however long the job is kept
JITTER = 0.2  # the share by which a pause may be longer, so that posts do not come all at once
MAX_RETRY_AFTER = 3600.0  # seconds for which a host may ask
GONE, BUSY = 410, (429, 503)  # statuses that end the retries, and that may come with a Retry-After
MAX_POSTS = 256  # at once: hosts may be slow
POSTS_TO_A_HOST = 4  # at once, of one owner
PART_BYTES = 2**18  # of a result that is being posted, in memory
THREADS = 2  # that read and write what is stored
POLL_SECONDS = 1.0  # until posts that are due are looked for again
PAUSE = 0.05  # at least


class Webhooks:
    """`run` it as a task; `wake` it when a job ends."""

    def __init__(
        self, store: JobStore, settings: Settings, pauses: tuple[float, ...] = PAUSES
    ) -> None:
        self._store = store
        self._pauses = pauses
        self._outbound = Outbound(settings)
        secret = settings.webhook_secret
        self._signer = None if secret is None else Webhook(secret.get_secret_value())
        self._problem = Problem(log)
        self._awake = asyncio.Event()  # a post may be due, or there is room for one
        self._posting: dict[str, asyncio.Task[None]] = {}  # by the job's id
        self._places = Places(MAX_POSTS)  # that these have
        self._threads = ThreadPool(THREADS, "sdbento-webhook")

    def wake(self) -> None:
        self._awake.set()

    async def run(self) -> None:
        """Post what is due, for ever. If this is cancelled, open posts are made again later."""
        try:
            while True:
                self._awake.clear()
                await self._start_due()
                await asyncio.sleep(PAUSE)
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(POLL_SECONDS, *self._pauses)):
                        await self._awake.wait()
        finally:
            posting = list(self._posting.values())
            for task in posting:
                task.cancel()
            await asyncio.gather(*posting, return_exceptions=True)
            # Wait for these: the store is closed next.
            await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    async def _start_due(self) -> None:
        free = with_reserve(MAX_POSTS) - len(self._posting)
        if free <= 0:
            return
        find = partial(self._store.webhooks.due, each=POSTS_TO_A_HOST, posting=[*self._posting])
        try:
            due = await self._threads.run(find, free)
        except Exception as exc:
            reason = classify(exc).message
            self._problem.note(f"due webhooks cannot be read: {reason}", unexplained(exc))
            return
        self._problem.solved()
        for job in due:
            # Leave room for the posts of others, whose hosts may be faster.
            if not self._places.has_room(_owner_of(job)):
                continue
            task = start_task(self._post_and_note(job), f"sdbento webhook of job {job.id}")
            self._posting[job.id] = task
            self._places.change(job.owner, 1)
            task.add_done_callback(partial(self._post_ended, job))

    def _post_ended(self, job: Job, _: asyncio.Task[None]) -> None:
        del self._posting[job.id]
        self._places.change(job.owner, -1)
        self.wake()

    async def _post_and_note(self, job: Job) -> None:
        try:
            with acting_for(_owner_of(job)):
                answer = await self._post(job)
            again_in = milliseconds_until_next(job, answer, self._store.now(), self._pauses)
            # The job is not posted again meanwhile: this task counts as its post until it ends.
            await retry_while_refused(
                lambda: self._threads.run(self._store.webhooks.note, job, again_in),
                f"that the webhook of job {job.id} was posted cannot be kept",
            )
        except Exception as exc:
            reason = classify(exc).message
            log.error("the webhook of job %s: %s", job.id, reason, exc_info=unexplained(exc))
            await asyncio.sleep(POLL_SECONDS)  # the post is still due: do not repeat it at once

    async def _post(self, job: Job) -> Answer | None:
        """What the webhook's host answered, None if it did not."""
        assert job.webhook is not None
        try:
            headers = {"content-type": "application/json"}
            if self._signer is not None:
                headers |= await self._threads.run(self._signature, self._signer, job)
            answer = await self._send(job, job.webhook, headers)
        except Exception as exc:
            log.warning("job %s: %s", job.id, classify(exc).message)
            webhooks_total.add("unanswered")
            return None
        webhooks_total.add("accepted" if answer.accepted else "refused")
        if not answer.accepted:
            log.warning("job %s: the host of its webhook answered %d", job.id, answer.status)
        return answer

    async def _send(self, job: Job, url: str, headers: dict[str, str]) -> Answer:
        """Post the status body. The host, which whoever has queued the job has chosen, is told of
        the job's trace if it has one."""
        known = {"sdbento.job_id": job.id, "server.address": urlsplit(url).hostname}
        with spans.continuing(job.traceparent, "POST webhook", known, SpanKind.CLIENT):
            if (traceparent := spans.traceparent()) is not None:
                headers = {**headers, spans.TRACEPARENT: traceparent}
            answer = await self._outbound.send(
                "POST", url, self._body(job), headers, param="webhook"
            )
            spans.describe({"http.response.status_code": answer.status})
            return answer

    def _body(self, job: Job) -> Body:
        """The status body, whose result is read while it is sent: it may be large, and the host
        slow."""
        before, after = around_result(job)
        size = job.size if job.status == "COMPLETED" else 0

        async def parts() -> AsyncIterator[bytes]:
            yield before
            for start in range(0, size, PART_BYTES):
                yield await self._threads.run(self._store.part_of_result, job, start, PART_BYTES)
            yield after

        return Body(len(before) + size + len(after), parts())

    def _signature(self, signer: Webhook, job: Job) -> dict[str, str]:
        """The headers that sign a post. All posts about this end of the job have the same id.

        Blocking: reads the whole result, as many at once as there are threads."""
        body = status_body(job, self._store.result(job))
        event, now = f"{job.id}-{job.finished}", datetime.now(UTC)
        return {
            "webhook-id": event,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": signer.sign(event, now, body.decode()),
        }


def _owner_of(job: Job) -> Caller:
    return Caller(job.key_name, shares=job.key_name is not None, address=job.address)


def milliseconds_until_next(
    job: Job, answer: Answer | None, now: int, pauses: tuple[float, ...] = PAUSES
) -> int | None:
    """When a webhook is posted again after this answer, or after none; None: not any more."""
    if answer is not None and (answer.accepted or answer.status == GONE):
        return None
    pause = pauses[min(job.webhook_posts, len(pauses) - 1)]
    pause *= 1 + JITTER * random.random()
    if answer is not None and answer.status in BUSY and answer.retry_after is not None:
        pause = max(pause, min(answer.retry_after, MAX_RETRY_AFTER))
    assert job.delete_after is not None  # the job has ended
    until_next = round(pause * 1000)
    kept = now + until_next <= job.delete_after
    return until_next if kept or job.webhook_posts < RUNPODS_RETRIES else None
