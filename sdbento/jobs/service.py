"""Runs stored jobs through the App: takes them up in order, stops them, sees them ended.

    submit -> store -> claim -> App.stream -> store -> whoever waits, webhook

At most as many jobs run as the engine can use; the others wait in the store, whatever the App's own
queue may hold. Every change of a job's status is the store's; what is here may be killed at any
time. Everything runs on one event loop, what blocks in threads. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sdbento.errors import (
    DeadlineExceeded,
    MalformedRequest,
    NotFound,
    Overloaded,
    SDBentoError,
    Unavailable,
    classify,
    unexplained,
)
from sdbento.jobs.format import JobInput, one_line, read, status_body
from sdbento.jobs.progress import ProgressOfAll
from sdbento.jobs.retry import insist
from sdbento.jobs.store import Counts, JobStore
from sdbento.jobs.table import Job, NewJob, milliseconds
from sdbento.jobs.webhooks import Webhooks
from sdbento.request.schema import GenerateRequest, GenerateResponse
from sdbento.settings import Settings

if TYPE_CHECKING:
    from sdbento.app import App

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 4  # that wait for the store
MAX_CHUNK_BYTES = 1_000_000  # RunPod's limit for one event of /stream


@dataclass(frozen=True)
class Pace:
    """How often and how long; in seconds."""

    tick: float = 1.0  # between looks for jobs whose ttl has passed
    tidying: float = 60.0
    grace: float = 5.0  # for running jobs to finish when the server stops
    overloaded: float = 1.0  # before a job is tried that the App had no room for


class Jobs:
    """The jobs of one server. `start` it, ask it, `stop` it, all on one event loop."""

    def __init__(
        self,
        app: App,
        store: JobStore,
        settings: Settings,
        *,
        pace: Pace | None = None,
        webhooks: Webhooks | None = None,
    ) -> None:
        self._app = app
        self._store = store
        self._settings = settings
        self._pace = pace or Pace()
        self._webhooks = webhooks or Webhooks(store, settings)
        # Twice what shares a batch: the next ones are prepared while these are denoised.
        room = settings.max_queue_size + settings.max_batch_size
        self._max_running = min(2 * settings.max_batch_size, room)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._progress = ProgressOfAll()
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._news = asyncio.Event()
        self._hold_until = 0.0  # the App is full; no job is begun before
        self._unsure = False  # whether the store may have begun jobs that are not in `_running`
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []  # the first is the dispatcher
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="sdbento-jobs")

    async def start(self) -> None:
        """Go on where the last process stopped."""
        if count := await self._call(self._store.recover):
            log.info("%d jobs were running when the server ended; they are run again", count)
        loops = self._dispatch(), self._tidy(), self._webhooks.run()
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    def wind_up(self) -> None:
        """The server is about to stop: no more jobs are begun, nobody waits for one any longer."""
        self._stopping = True
        self._news.set()
        for job_id in self._waiters:
            self._tell(job_id)
        self._progress.wake_all()

    async def stop(self) -> None:
        """Let running jobs finish for a while, put the rest back into the queue, close the store.

        Call it before the App is closed.
        """
        self.wind_up()
        await asyncio.wait(self._tasks[:1])  # not cancelled: it may just be taking jobs up
        if self._running:
            await asyncio.wait(self._running.values(), timeout=self._pace.grace)
        unfinished = list(self._running.values())
        for task in [*unfinished, *self._tasks]:
            task.cancel()
        await asyncio.wait([*unfinished, *self._tasks])
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._store.close)

    # What doors ask

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def submit(self, new: NewJob) -> None:
        """Accept a job. Raises Overloaded."""
        await self._queue(self._store.add, new)
        if new.error is None:
            self._news.set()
        else:
            self._tell(new.id)

    async def get(self, job_id: str) -> Job:
        """Raises NotFound, as all that ask for a job."""
        job = await self._call(self._store.get, job_id)
        if job is None:
            raise NotFound(f"there is no job {job_id[:80]!r}, or it has expired", param="id")
        return job

    async def wait(self, job_id: str, seconds: float) -> Job:
        """The job, finished unless that took longer."""
        changed = asyncio.Event()
        self._waiters.setdefault(job_id, set()).add(changed)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while (job := await self.get(job_id)).unfinished and not self._stopping:
                        await changed.wait()
                        changed.clear()
                    return job
            return await self.get(job_id)
        finally:
            self._waiters[job_id].discard(changed)
            if not self._waiters[job_id]:
                del self._waiters[job_id]

    async def describe(self, job: Job) -> bytes:
        """What /status answers: JSON, with the output of a completed job."""
        return await self._call(lambda: status_body(job, self._store.output(job)))

    async def stream(self, job_id: str, seconds: float) -> tuple[Job, list[dict[str, Any]]]:
        """The job, and what happened to it since the last call; the last event has the output.

        seconds: for which to wait while nothing has happened.
        """
        job = await self.get(job_id)
        progress = self._progress.of(job_id)
        if job.unfinished and not self._stopping:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await progress.changed.wait()
            job = await self.get(job_id)
        events = progress.take()
        if job.status == "COMPLETED" and not progress.told:
            progress.told = True
            output = await self._call(self._store.output, job)
            fits = output is not None and len(output) <= MAX_CHUNK_BYTES
            events.append({"event": "done", "output": json.loads(output or b"") if fits else None})
        return job, events

    async def cancel(self, job_id: str) -> Job:
        """The job, cancelled unless it was finished; its work stops between two steps."""
        job = await self._call(self._store.cancel, job_id)
        if job is None:
            return await self.get(job_id)
        if job.status == "CANCELLED" and (task := self._running.get(job_id)) is not None:
            task.cancel()
        self._tell(job_id)
        return job

    async def retry(self, job_id: str) -> None:
        """Queue a failed or timed-out job again.

        Raises MalformedRequest for any other, Overloaded.
        """
        if not await self._queue(self._store.retry, job_id):
            job = await self.get(job_id)
            raise MalformedRequest(
                "only a job that is FAILED or TIMED_OUT, and not for a bad input, can be retried; "
                f"this one is {job.status}" + (f": {job.error}" if job.error else ""),
                param="id",
            )
        self._progress.forget([job_id])
        self._news.set()

    async def purge(self) -> int:
        """Cancel all that waits in the queue; how many."""
        cancelled = await self._call(self._store.purge)
        for job_id in cancelled:
            self._tell(job_id)
        return len(cancelled)

    async def counts(self) -> Counts:
        return await self._call(self._store.counts)

    # What goes on by itself

    async def _dispatch(self) -> None:
        while not self._stopping:
            self._news.clear()
            try:
                await self._take_up()
            except Exception as exc:
                self._unsure = True  # a commit's answer may be what was lost
                reason = classify(exc).message
                log.error("no jobs can be taken up now: %s", reason, exc_info=unexplained(exc))
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pace.tick):
                    await self._news.wait()

    async def _take_up(self) -> None:
        for job_id in await self._call(self._store.expire):
            self._tell(job_id)
        free = self._max_running - len(self._running)
        if self._stopping or free <= 0 or time.monotonic() < self._hold_until:
            return
        if self._unsure:
            await self._call(self._store.requeue, list(self._running))
            self._unsure = False
        for job in await self._call(self._store.claim, free):
            task = asyncio.create_task(self._run(job))
            self._running[job.id] = task
            # Not in `_run` itself, which a task that is cancelled at once never enters.
            task.add_done_callback(partial(self._ran, job.id))

    async def _run(self, job: Job) -> None:
        """One run of a job, to whatever end."""
        try:
            await self._run_to_its_end(job)
        except Unavailable as exc:  # the store is another server's now, or was removed
            log.error("what became of job %s cannot be kept: %s", job.id, exc.message)

    async def _run_to_its_end(self, job: Job) -> None:
        try:
            output = await self._make(job)
            if output is not None and not await self._keep(self._store.complete, job, output):
                log.info("job %s was ended before its result came", job.id)
        except asyncio.CancelledError:
            if self._stopping:
                await self._call(self._store.release, job)
        except Exception as exc:
            await self._give_up(job, classify(exc))

    def _ran(self, job_id: str, task: asyncio.Task[None]) -> None:
        if self._running.get(job_id) is task:  # released, it may have been taken up again
            del self._running[job_id]
        self._tell(job_id)
        self._news.set()

    async def _make(self, job: Job) -> bytes | None:
        """The output of a job; None for one that was cancelled just as it was taken up."""
        current = await self._keep(self._store.get, job.id)
        if current is None or (current.status, current.run) != ("IN_PROGRESS", job.run):
            return None
        asked = await self._call(lambda: read(json.loads(job.input or "")))
        response = await self._generate(job, asked)
        return await self._call(asked.output, response)

    async def _generate(self, job: Job, asked: JobInput) -> GenerateResponse:
        seconds, reason = _limit(job)
        request = _within(asked.request, seconds)
        try:
            async with asyncio.timeout(seconds) as limit:
                return await self._follow(job.id, request)
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(reason) from None

    async def _follow(self, job_id: str, request: GenerateRequest) -> GenerateResponse:
        async with aclosing(self._app.stream(request)) as events:
            async for event in events:
                if event["event"] == "done":
                    response: GenerateResponse = event["response"]
                else:
                    self._progress.of(job_id).push(event)
        return response

    async def _give_up(self, job: Job, error: SDBentoError) -> None:
        """A run came to nothing: that is the job's end, unless it is none of the job's doing."""
        if isinstance(error, Overloaded):
            self._hold_until = time.monotonic() + self._pace.overloaded
            await self._keep(self._store.release, job)
        elif self._stopping and type(error) is Unavailable:
            await self._keep(self._store.release, job)
        elif isinstance(error, DeadlineExceeded):
            await self._keep(self._store.fail, job, one_line(error), "TIMED_OUT")
        else:
            if error.status >= 500:
                log.error("job %s failed: %s", job.id, error.message, exc_info=unexplained(error))
            await self._keep(self._store.fail, job, one_line(error))

    async def _tidy(self) -> None:
        while True:
            try:
                self._progress.forget(await self._call(self._store.tidy))
            except Exception as exc:
                reason = classify(exc).message
                log.error("expired jobs cannot be deleted: %s", reason, exc_info=unexplained(exc))
            await asyncio.sleep(self._pace.tidying)

    def _tell(self, job_id: str) -> None:
        """Something happened to a job: let those look who wait for its end."""
        for changed in self._waiters.get(job_id, ()):
            changed.set()
        self._progress.wake(job_id)
        self._webhooks.wake()

    async def _queue(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `_call`, for what makes the queue longer: who must not is told when to come again."""
        try:
            return await self._call(function, *args, **kwargs)
        except Overloaded as error:
            error.retry_after = max(1.0, self._app.engine.seconds_per_request)
            raise

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))

    async def _keep(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `_call`, for what must not fail with the database or the disk: until they do it."""
        return await insist(lambda: self._call(function, *args, **kwargs), "a job's end")


def _limit(job: Job) -> tuple[float, str]:
    """The seconds that a job which begins now may run for, and what is wrong after them."""
    allowed, left = job.execution_timeout, max(1, job.expires - milliseconds())
    if left < allowed:
        return left / 1000, f"the job has waited and run for longer than its ttl of {job.ttl} ms"
    return allowed / 1000, f"the job ran for longer than its executionTimeout of {allowed} ms"


def _within(request: GenerateRequest, seconds: float) -> GenerateRequest:
    """The request with the job's time limit, or its own where that is shorter."""
    return request.model_copy(update={"timeout": min(seconds, request.timeout or seconds)})
