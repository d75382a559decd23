"""The jobs, as the doors see them: submit, look at, wait for, cancel and retry them.

    submit -> store -> dispatcher -> store -> requests that wait, webhook

A job belongs to the key that asked for it: for the others it is not there. Where servers share a
database, each of them answers for all jobs, whoever runs them. Everything runs on one event loop,
calls that block on threads. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sdbento.access.caller import current_caller
from sdbento.access.threads import SharedThreads
from sdbento.background import ThreadPool, start_task
from sdbento.errors import (
    Cancelled,
    InvalidParameter,
    MalformedRequest,
    NotFound,
    Overloaded,
    Unavailable,
    classify,
    unexplained,
)
from sdbento.jobs.dispatcher import Dispatcher, Intervals
from sdbento.jobs.fleet.heartbeat import Heartbeat
from sdbento.jobs.fleet.notices import Kind
from sdbento.jobs.fleet.relay import Relay
from sdbento.jobs.fleet.servers import BEAT, State
from sdbento.jobs.formats.a1111 import AnswerCall
from sdbento.jobs.progress import ProgressOfJobs
from sdbento.jobs.runpod_format import MAX_EVENT_BYTES, status_body
from sdbento.jobs.store.job_store import Counts, JobStore
from sdbento.jobs.table import Job, NewJob, route_of
from sdbento.jobs.webhooks import Webhooks
from sdbento.metrics.definitions import jobs as jobs_gauge
from sdbento.metrics.requests import count_without_run, current_request
from sdbento.settings import Settings
from sdbento.telemetry import spans

if TYPE_CHECKING:
    from sdbento.app import App

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

LOOK_AGAIN = 5.0  # seconds after which who waits looks again: another server's word may be lost
THREADS = 4  # for calls of the store, of those who ask; and as many for the jobs that run


class Jobs:
    """The jobs of one server. `start` it, ask it, `stop` it, all on one event loop."""

    def __init__(
        self,
        app: App,
        store: JobStore,
        settings: Settings,
        *,
        answer_call: AnswerCall,
        intervals: Intervals | None = None,
        webhooks: Webhooks | None = None,
    ) -> None:
        self._app = app
        self._store = store
        self._intervals = intervals or Intervals()
        self._webhooks = webhooks or Webhooks(store, settings)
        self._threads = SharedThreads(THREADS, "sdbento-jobs")
        # Whoever asks all the time holds up neither jobs that run nor those that begin.
        self._own_threads = ThreadPool(THREADS, "sdbento-dispatcher")
        self._progress = ProgressOfJobs()
        self._dispatcher = Dispatcher(
            app,
            store,
            self._own_threads,
            self._progress,
            settings,
            self._intervals,
            on_change=self._announce,
            answer_call=answer_call,
            before_end=self._flush,
        )
        self._relay = Relay(store, self._own_threads, self._progress)
        self._heartbeat = Heartbeat(lambda: store.beat(self._state()), BEAT)
        self._waiting: dict[str, set[asyncio.Event]] = {}  # set when the job of that id changes
        self._stopping = False
        self._broken = False  # whether one of the tasks has died

    async def start(self) -> None:
        """Continue where the last process stopped."""
        if count := await self._own_threads.run(self._store.recover):
            log.info("%d jobs were running when the server ended; they are run again", count)
        start = partial(start_task, on_failure=self._loop_died)
        self._dispatching = start(self._dispatcher.run(), "sdbento job dispatcher")
        self._tidying = start(self._delete_old_jobs(), "sdbento job tidying")
        self._counting = start(self._count_jobs(), "sdbento job counts")
        self._posting = start(self._webhooks.run(), "sdbento webhooks")
        if self._store.is_shared:
            self._heartbeat.start()
            listener = self._store.listener(self._hear)
            self._listening = start(listener.run(), "sdbento notices of other servers")

    def prepare_to_stop(self) -> None:
        """The server will stop soon: begin no more jobs, and let no request wait for one.

        The server finishes open requests before it stops: one that waits for a job which is not
        begun any more would hold up the stop.
        """
        self._stopping = True
        self._dispatcher.stop_claiming()
        for job_id in self._waiting:
            self._announce(job_id)
        self._progress.wake_all()

    async def stop(self) -> None:
        """Let running jobs finish for a while, put the rest back into the queue, close the store.

        Must be called before the App is closed.
        """
        self.prepare_to_stop()
        await asyncio.wait([self._dispatching])  # not cancelled: it may just be claiming jobs
        await self._dispatcher.stop_running()
        others = [self._tidying, self._counting, self._posting]
        if self._store.is_shared:
            others.append(self._listening)
            await asyncio.to_thread(self._heartbeat.stop)
        for task in others:
            task.cancel()
        await asyncio.wait(others)
        for threads in (self._threads, self._own_threads):
            await asyncio.to_thread(threads.shutdown)
        await asyncio.to_thread(self._store.close)

    @property
    def num_running(self) -> int:
        """How many of the caller's jobs run."""
        return self._dispatcher.num_running(current_caller().name)

    async def submit(self, new: NewJob) -> None:
        """Accept a job of the caller's. Raises Overloaded, Unavailable if jobs are not run any
        more."""
        caller = current_caller()
        job = replace(
            new,
            key_name=caller.name,
            address=caller.address,
            traceparent=spans.traceparent(),
        )
        await self._enqueue(self._store.add, job, shared=caller.shares)
        if new.error is None:
            current_request().hand_over()
            self._dispatcher.wake()
        else:
            current_request().end(InvalidParameter.outcome)
            self._announce(new.id)

    async def get(self, job_id: str) -> Job:
        """Raises NotFound, also for jobs of others, as do all methods that take a job's id."""
        job = await self._threads.run(self._store.get, job_id)
        if job is None or job.key_name != current_caller().name:
            raise _not_found(job_id)
        return job

    async def wait(self, job_id: str, seconds: float) -> Job:
        """The job when it has finished, or as it is after so many `seconds`."""
        changed = asyncio.Event()
        self._waiting.setdefault(job_id, set()).add(changed)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while (job := await self.get(job_id)).unfinished and not self._stopping:
                        with suppress(TimeoutError):
                            async with asyncio.timeout(LOOK_AGAIN):
                                await changed.wait()
                        changed.clear()
                    return job
            return await self.get(job_id)
        finally:
            self._waiting[job_id].discard(changed)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    async def describe(self, job: Job) -> bytes:
        """What /status answers: JSON, with the output of a completed job."""
        return await self._threads.run(lambda: status_body(job, self._store.result(job)))

    async def stream(self, job_id: str, seconds: float) -> tuple[Job, list[dict[str, Any]]]:
        """The job and its events since the last call; the last event of all has the output.

        seconds: how long to wait for an event if there is none yet.
        """
        job = await self.get(job_id)
        progress = self._progress.of(job)
        if job.unfinished and self._store.is_shared and not self._dispatcher.runs(job_id):
            await self._threads.run(self._store.events.ask, job_id)
        if job.unfinished and not self._stopping:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await progress.changed.wait()
            job = await self.get(job_id)
        events = progress.take_all()
        if self._store.is_shared:
            events = await self._threads.run(self._store.events.take, job_id) + events
        is_new = job.status == "COMPLETED" and job.streamed != job.run
        if is_new and await self._threads.run(self._store.take_output, job):
            result = await self._threads.run(self._store.result, job)
            output = None
            if result is not None and len(result) <= MAX_EVENT_BYTES:
                output = json.loads(result)
            events.append({"event": "done", "output": output})
        return job, events

    async def cancel(self, job_id: str) -> Job:
        """Cancel the job unless it has finished; its work stops between two steps. Returns it."""
        before = await self.get(job_id)
        job = await self._threads.run(self._store.cancel, job_id)
        if job is None:
            raise _not_found(job_id)
        if job.status == "CANCELLED":
            self._dispatcher.cancel(job_id)  # which counts it if it was begun, even meanwhile
            if before.status == "IN_QUEUE" and before.run == job.run:
                count_without_run(route_of(job_id), Cancelled.outcome, "cancel")
        self._announce(job_id)
        return job

    async def retry(self, job_id: str) -> None:
        """Queue a job again that failed or timed out.

        Raises MalformedRequest for any other job, Overloaded and Unavailable like `submit`.
        """
        job = await self.get(job_id)
        if not await self._enqueue(self._store.retry, job_id, shared=current_caller().shares):
            job = await self.get(job_id)
            raise MalformedRequest(
                "only a job that is FAILED or TIMED_OUT can be retried, and not one with a bad "
                "input or with an s3Config, whose secrets are not kept; this one is "
                f"{job.status}" + (f": {job.error}" if job.error else ""),
                param="id",
            )
        self._progress.forget([job_id])
        self._dispatcher.wake()

    async def purge(self) -> int:
        """Cancel all of the caller's jobs that wait in the queue: without keys, those that were
        asked for from the same address. Returns how many."""
        caller = current_caller()
        cancelled = await self._threads.run(self._store.purge, caller.name, caller.address)
        for job_id in cancelled:
            count_without_run(route_of(job_id), Cancelled.outcome, "purge")
            self._announce(job_id)
        return len(cancelled)

    async def counts(self) -> Counts:
        """How many jobs the caller has."""
        return await self._threads.run(self._store.counts, current_caller().name)

    async def _enqueue(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of the store that queues a job; if it is full, say when to try again."""
        if self._broken:
            raise Unavailable("jobs are not run any more; the server must be restarted")
        try:
            return await self._threads.run(function, *args, **kwargs)
        except Overloaded as error:
            error.retry_after = self._app.seconds_until_end(current_caller().owner)
            raise

    async def workers(self) -> list[tuple[State, bool]]:
        """All servers, this one first, and whether they run jobs of the caller's."""
        own = [(self._state(), self.num_running > 0)]
        if not self._store.is_shared:
            return own
        return own + await self._threads.run(self._store.workers, current_caller().name)

    def _state(self) -> State:
        return State(self._app.alive, self._app.ready, self._app.resident_models())

    async def _flush(self, job_id: str) -> None:
        """The job is about to end: let others know what has happened before."""
        await self._relay.flush(job_id)
        self._relay.forget(job_id)

    def _hear(self, kind: Kind, job_id: str) -> None:
        """What this server or another has told all."""
        match kind:
            case "queued":
                self._dispatcher.wake()
            case "ended":
                self._wake(job_id)
                if self._dispatcher.runs(job_id):  # it may have been cancelled
                    self._dispatcher.wake()
            case "watched":
                if self._dispatcher.runs(job_id):
                    self._relay.watch(job_id)
            case "happened":
                self._progress.wake(job_id)
            case "missed":
                self._dispatcher.wake()
                for waiting in list(self._waiting):
                    self._wake(waiting)
                self._progress.wake_all()

    def _announce(self, job_id: str) -> None:
        """The status of a job may have changed, here: wake its webhook and who waits for it."""
        self._wake(job_id)
        self._webhooks.wake()

    def _wake(self, job_id: str) -> None:
        for changed in self._waiting.get(job_id, ()):
            changed.set()
        self._progress.wake(job_id)

    def _loop_died(self) -> None:
        """A task that must run as long as the server has died of a bug, which was logged.

        Without the dispatcher jobs would stay IN_QUEUE for ever on a server that says it is well.
        So the server says that it is not, and whoever watches it starts a new one, which finds all
        jobs in the store.
        """
        self._broken = True
        self._app.report_broken("a background task of the jobs has died")

    async def _delete_old_jobs(self) -> None:
        while True:
            try:
                self._progress.forget(await self._own_threads.run(self._store.tidy))
            except Exception as exc:
                reason = classify(exc).message
                log.error("expired jobs cannot be deleted: %s", reason, exc_info=unexplained(exc))
            await asyncio.sleep(self._intervals.tidying)

    async def _count_jobs(self) -> None:
        """Tell the metrics. Other servers may share the store, so no event would do."""
        while True:
            try:
                totals = await self._own_threads.run(self._store.totals)
                for status, number in totals.items():
                    jobs_gauge.set(number, status)
            except Exception as exc:  # others say so in the log
                log.debug("jobs cannot be counted: %s", classify(exc).message)
            await asyncio.sleep(self._intervals.counting)


def _not_found(job_id: str) -> NotFound:
    return NotFound(f"there is no job {job_id[:80]!r}, or it has expired", param="id")
