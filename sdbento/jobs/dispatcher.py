"""Runs stored jobs through the App: claims them in order, runs them, stores how each one ended.

    store.claim -> App.stream -> store.complete, store.fail or store.release

At most as many jobs run as the engine can use, though one at least of everybody who has any; the
others wait in the store. Every change of a job's status is made by the store, so that this may be
killed at any time. Everything runs on one event loop, calls that block on threads. Every job runs
on behalf of the key that asked for it, as that key's other requests do. Knows nothing of how jobs
come here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from cachetools import TTLCache

from sdbento.access.caller import Caller, acting_for, current_caller
from sdbento.access.keyring import Keyring
from sdbento.access.limits import with_reserve
from sdbento.access.places import HostPlaces
from sdbento.background import Problem, ThreadPool, start_task
from sdbento.errors import (
    OK,
    DeadlineExceeded,
    Forbidden,
    LimitReached,
    Overloaded,
    SDBentoError,
    Unavailable,
    classify,
    unexplained,
)
from sdbento.jobs.delivery.deliver import Delivery, Result
from sdbento.jobs.delivery.s3_config import S3Config
from sdbento.jobs.formats.a1111 import AnswerCall, Call
from sdbento.jobs.formats.inputs import read_input, run_input
from sdbento.jobs.formats.native import JobInput
from sdbento.jobs.progress import ProgressOfJobs
from sdbento.jobs.retry import retry_while_refused
from sdbento.jobs.runpod_format import one_line
from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.table import Job, route_of
from sdbento.metrics.requests import count_without_run, counting, current_request
from sdbento.outbound.urls import registered_name
from sdbento.settings import Settings
from sdbento.telemetry.job import running_job

if TYPE_CHECKING:
    from sdbento.app import App

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_OWNERS = 64  # who have a job running, however many of others run
UPLOAD_BYTES = 2**30  # of images that are on their way to buckets of clients
LEAST_UPLOAD, LARGEST_UPLOAD = UPLOAD_BYTES // 64, UPLOAD_BYTES // 4  # for which a job counts
UPLOADS_TO_A_HOST = 4  # jobs of one owner
GONE_SECONDS = (
    60.0  # after which a key that is missing may again be one whose file is being written
)


@dataclass(frozen=True)
class Intervals:
    """How often things are done and how long they may take, in seconds."""

    expiry: float = 1.0  # between two searches for jobs whose ttl has passed
    tidying: float = 60.0  # between two deletions of old jobs
    counting: float = 5.0  # between two counts of all jobs, for metrics
    grace: float = 5.0  # for running jobs to finish when the server stops
    overloaded: float = 1.0  # before jobs are claimed again after the App had no room for one
    key_gone: float = 3.0  # for a key to come back that is missing


@dataclass
class _Run:
    """A job that runs: which run of it this is, whose it is, the task that runs it, and whether it
    needs the App no more, for its images are made and on their way to a bucket."""

    number: int
    key_name: str | None
    owner: str | None
    task: asyncio.Task[None]
    is_made: bool = False


class Dispatcher:
    """`run` it as a task; `wake` it when a job was queued.

    on_change: called with the id of every job whose status may have changed. answer_call: answers
    the jobs that are calls of AUTOMATIC1111's API. before_end: awaited with the id of a job before
    its result is stored.
    """

    def __init__(
        self,
        app: App,
        store: JobStore,
        threads: ThreadPool,
        progress: ProgressOfJobs,
        settings: Settings,
        intervals: Intervals,
        on_change: Callable[[str], None],
        answer_call: AnswerCall,
        before_end: Callable[[str], Awaitable[None]],
    ) -> None:
        self._app = app
        self._store = store
        self._threads = threads
        self._progress = progress
        self._intervals = intervals
        self._settings = settings
        self._on_change = on_change
        self._answer_call = answer_call
        self._before_end = before_end
        # Twice what fits into a batch: the next jobs are prepared while these are denoised.
        batch = settings.max_batch_size * app.num_devices
        room = settings.max_queue_size + batch
        self._max_running = min(2 * batch, room)
        self._max_owners = min(MAX_OWNERS, room)
        self._delivery = Delivery(settings, limited=False)
        self._uploads = HostPlaces(UPLOAD_BYTES, UPLOADS_TO_A_HOST)
        self._keyring = Keyring(settings)
        self._running: dict[str, _Run] = {}
        self._awake = asyncio.Event()  # there may be something to claim, or room for it
        self._expire_after = 0.0  # time.monotonic() of the next look for jobs whose ttl is over
        self._claim_after = 0.0  # time.monotonic() before which the App is taken to be full
        self._pauses: dict[str, float] = {}  # the same by owner, for those at a limit of their own
        # Owners whose key was not there lately, and when that was first seen.
        self._gone: TTLCache[str, float] = TTLCache(1024, GONE_SECONDS)
        # Whether the store may have jobs IN_PROGRESS that no task of `_running` runs, as when the
        # database's answer to a claim was lost. They would stay IN_PROGRESS for ever.
        self._must_requeue = False
        self._problem = Problem(log)
        self._stopping = False

    def num_running(self, key_name: str | None) -> int:
        """How many jobs of that key run; None: of all without one."""
        return sum(run.key_name == key_name for run in self._running.values())

    def runs(self, job_id: str) -> bool:
        return job_id in self._running

    def wake(self) -> None:
        self._awake.set()

    def cancel(self, job_id: str) -> None:
        """Stop the work on a job that has been cancelled, if it is running."""
        run = self._running.get(job_id)
        # /cancel may come again: a second one would break into the clean-up after the first.
        if run is not None and not run.task.cancelling():
            run.task.cancel()

    def stop_claiming(self) -> None:
        """Begin no more jobs: `run` returns soon."""
        self._stopping = True
        self.wake()

    async def stop_running(self) -> None:
        """Let running jobs finish for a while, put the rest back into the queue.

        `run` must have ended, and so begins no more.
        """
        if self._running:
            tasks = [run.task for run in self._running.values()]
            await asyncio.wait(tasks, timeout=self._intervals.grace)
        unfinished = [run.task for run in self._running.values()]
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished)
        self._delivery.close()

    async def run(self) -> None:
        """Claim jobs and start a task for each, until `stop_claiming`."""
        while not self._stopping:
            self._awake.clear()
            try:
                await self._claim()
            except Exception as exc:
                self._must_requeue = True
                reason = classify(exc).message
                self._problem.note(f"no jobs can be taken up now: {reason}", unexplained(exc))
            else:
                self._problem.solved()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._intervals.expiry):
                    await self._awake.wait()

    async def _claim(self) -> None:
        await self._expire()
        if self._store.is_shared:
            await self._stop_lost()
        running = {i: run.owner for i, run in self._running.items() if not run.is_made}
        has_reserve = len(running) < with_reserve(self._max_running)
        full = not has_reserve and len({*running.values()}) >= self._max_owners
        may_claim = self._app.alive and not self._stopping and not full
        if not may_claim or time.monotonic() < self._claim_after:
            return
        if self._must_requeue:
            await self._threads.run(self._store.requeue, list(self._running))
            self._must_requeue = False
        now = time.monotonic()
        self._pauses = {owner: end for owner, end in self._pauses.items() if end > now}
        claim = partial(
            self._store.claim,
            self._max_running - len(running),
            max_owners=self._max_owners,
            running=running,
            made=self._running.keys() - running.keys(),
            shared=self._keyring.shared,
            except_of=[*self._pauses],
        )
        for job in await self._threads.run(claim):
            task = start_task(self._run_job(job), f"sdbento job {job.id}")
            self._running[job.id] = _Run(job.run, job.key_name, job.owner, task)
            # Not at the end of `_run_job`: a task that is cancelled at once never enters it.
            task.add_done_callback(partial(self._job_ended, job.id))

    async def _expire(self) -> None:
        """End the jobs that have waited for too long, now and then: with many servers on a database
        somebody wakes this up all the time."""
        if (now := time.monotonic()) < self._expire_after:
            return
        self._expire_after = now + self._intervals.expiry
        for job_id in await self._threads.run(self._store.expire):
            count_without_run(route_of(job_id), DeadlineExceeded.outcome)
            self._on_change(job_id)

    async def _stop_lost(self) -> None:
        """Stop the work on runs that are over, as another server has cancelled the job or taken it
        over."""
        runs = {job_id: run.number for job_id, run in self._running.items()}
        for job_id in await self._threads.run(self._store.over, runs):
            run = self._running.get(job_id)
            if run is not None and run.number == runs[job_id]:
                self.cancel(job_id)

    def _job_ended(self, job_id: str, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._must_requeue = True
        run = self._running.get(job_id)
        if run is not None and run.task is task:  # a released job may have been claimed again
            del self._running[job_id]
        self._on_change(job_id)
        self.wake()

    async def _run_job(self, job: Job) -> None:
        """One run of a job, however it ends."""
        try:
            with counting(route_of(job.id)):
                await self._run_and_store(job)
        except Unavailable as exc:  # another server has the store now, or its folder was removed
            log.error("what became of job %s cannot be kept: %s", job.id, exc.message)

    async def _run_and_store(self, job: Job) -> None:
        try:
            if (owner := await self._owner_of(job)) is None:
                await self._put_back(job)
                return
            with acting_for(owner), self._told(job):
                result = await self._make_result(job)
            await self._before_end(job.id)
            if result is None:
                current_request().cancel("cancel")
            elif await self._store_end(self._store.complete, job, result):
                current_request().end(OK)
            else:
                log.info("job %s was ended before its result came", job.id)
        except asyncio.CancelledError:
            if self._stopping:
                await self._threads.run(self._store.release, job)
            else:
                current_request().cancel("cancel")
        except Exception as exc:
            await self._store_failure(job, classify(exc))

    def _told(self, job: Job) -> AbstractContextManager[None]:
        """Tell operators of a run."""
        log_prompts = self._settings.log_prompts
        return running_job(job.id, job.key_name, job.traceparent, log_prompts=log_prompts)

    async def _owner_of(self, job: Job) -> Caller | None:
        """On whose behalf a job runs; None if that key is gone, but may soon be back.

        Raises Forbidden if that key is not valid any more.
        """
        name = job.key_name
        if name is None:  # it was accepted while the server had no keys
            return Caller(address=job.address)
        if not self._keyring.required:
            return Caller(name)
        if (caller := await self._keyring.caller(name)) is not None:
            self._gone.pop(name, None)
            return caller
        now = time.monotonic()
        if now < self._gone.setdefault(name, now) + self._intervals.key_gone:
            return None
        raise Forbidden("the key that asked for this job is not valid any more")

    async def _make_result(self, job: Job) -> bytes | None:
        """The result of a job, as JSON; None if it was cancelled just after it was claimed."""
        # If /cancel came between the claim and the start of this task, it found no task to stop.
        current = await retry_while_refused(
            lambda: self._threads.run(self._store.get, job.id), f"job {job.id} cannot be read"
        )
        if current is None or (current.status, current.run) != ("IN_PROGRESS", job.run):
            return None
        given = await self._threads.run(_input_of, job)
        result = await self._compute(job, given)
        return await self._deliver(job, result)

    async def _deliver(self, job: Job, result: Result) -> bytes:
        """The output of a job, as JSON.

        While its images are sent to a bucket that it brought along, its place to run is another's:
        that host may be slow. The bytes of such jobs are limited. Jobs beyond that keep their
        places, of which every owner leaves some to others.
        """
        if result.s3_config is None:
            return await self._output(job, result)
        size = sum(map(len, result.images))
        counted = min(max(LEAST_UPLOAD, size), LARGEST_UPLOAD)  # more might never be free at once
        site = registered_name(result.s3_config.host)
        async with self._uploads.hold(current_caller(), [site], num_places=counted):
            self._running[job.id].is_made = True
            self.wake()
            return await self._output(job, result)

    async def _output(self, job: Job, result: Result) -> bytes:
        output = await self._delivery.deliver(job.id, result)
        return await asyncio.to_thread(lambda: json.dumps(output).encode())

    async def _compute(self, job: Job, given: JobInput | Call) -> Result:
        """What a job makes. Raises DeadlineExceeded when its time is over, and App's errors."""
        seconds, reason = _time_limit(job, self._store.now())
        try:
            async with asyncio.timeout(seconds) as limit:
                return await run_input(
                    self._app,
                    given,
                    self._answer_call,
                    lambda message: self._progress.of(job).push(message),
                    _seconds_of(given, seconds),
                )
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(reason) from None

    async def _store_failure(self, job: Job, error: SDBentoError) -> None:
        """End a job whose run failed, or put it back into the queue if the job is not to blame.

        If the server must be replaced, the job stays IN_PROGRESS: the next server runs it again,
        and counts the interruption, lest a job that breaks every server is run for ever.
        """
        if error.status >= 500 and not self._app.alive:
            log.error("job %s is run again by the next server: %s", job.id, error.message)
        elif isinstance(error, LimitReached):
            await self._put_back(job)
        elif isinstance(error, Overloaded):
            self._claim_after = time.monotonic() + self._intervals.overloaded
            await self._store_end(self._store.release, job)
        elif self._stopping and type(error) is Unavailable:
            await self._store_end(self._store.release, job)
        elif isinstance(error, DeadlineExceeded):
            await self._store_end(self._store.fail, job, one_line(error), "TIMED_OUT")
            current_request().end(error.outcome)
        else:
            if error.status >= 500:
                log.error("job %s failed: %s", job.id, error.message, exc_info=unexplained(error))
            await self._store_end(self._store.fail, job, one_line(error))
            current_request().end(error.outcome)

    async def _put_back(self, job: Job) -> None:
        """Put a job back into the queue, where its owner's jobs wait for a while."""
        again = time.monotonic() + self._intervals.overloaded
        if job.owner is None:
            self._claim_after = again
        else:
            self._pauses[job.owner] = again
        await self._store_end(self._store.release, job)

    async def _store_end(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of the store, again while the database is away or the disk is full."""
        return await retry_while_refused(
            lambda: self._threads.run(function, *args, **kwargs), "a job's end cannot be kept"
        )


def _input_of(job: Job) -> JobInput | Call:
    assert job.input is not None  # the store forgets it only when the job has finished
    s3_config = None if job.s3_config is None else S3Config.of_stored(job.s3_config)
    return read_input(json.loads(job.input), s3_config)


def _time_limit(job: Job, now: int) -> tuple[float, str]:
    """The seconds for which a job that starts now may run, and the error if they do not suffice."""
    allowed, left = job.execution_timeout, max(1, job.expires - now)
    if left < allowed:
        return left / 1000, f"the job has waited and run for longer than its ttl of {job.ttl} ms"
    return allowed / 1000, f"the job ran for longer than its executionTimeout of {allowed} ms"


def _seconds_of(given: JobInput | Call, seconds: float) -> float:
    """A job's time limit, or that of its request where that is shorter; a call has none."""
    return seconds if isinstance(given, Call) else min(seconds, given.request.timeout or seconds)
