"""The job loop of RunPod's SDK, changed so that it loses no job.

What is wrong with the SDK's own loop (1.12.0, serverless/modules/rp_scale.py), and is right here:

- On SIGTERM it stops running jobs while a request for jobs is still open. The jobs which that
  request brings are queued, but neither run nor reported. Here the open request ends first, what it
  brought is run, all jobs finish, and then the loop shuts down.
- It dies, with all its jobs, if one job of a batch has no id ("KeyError: 'id'").
- It runs a job twice that the platform sends twice, and runs a job that was stopped in the queue.
- It asks a platform that is away a thousand times a second.
- With all its places taken, it waits up to a second after a job's end before it asks for the next.

Knows nothing of what is in a job.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from contextlib import suppress
from typing import Any

import aiohttp
from runpod.http_client import TooManyRequests
from runpod.serverless.modules import rp_http, rp_scale
from runpod.serverless.modules.rp_job import get_stop_signals, handle_job

from sdbento.backoff import Backoff
from sdbento.doors.runpod import wire
from sdbento.doors.runpod.wire import Session, WireJob

log = logging.getLogger(__name__)

# Of a job. The SDK makes keyword arguments of all its keys, and loses it if one is "self".
KEYS = ("id", "input", "batchId")
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 5.0  # seconds between two requests for jobs that fail
EMPTY_PAUSE = 0.1  # seconds between two requests for jobs that are answered at once with none
POLL_SECONDS = 0.02  # between two checks whether there is room for another job


class DrainingScaler(rp_scale.JobScaler):  # type: ignore[misc]  # the SDK is untyped
    """The SDK's `JobScaler`, but it drains on SIGTERM and SIGINT, and when `drain` is called.

    To drain is to finish the jobs under way and take no new ones. `install` puts this class in the
    place of the SDK's. The two fetchers and the handler are attributes because the SDK replaces
    them when it runs a job locally.
    """

    drain_seconds = 20.0  # for which draining waits for an open request for jobs; set by `install`
    current: DrainingScaler | None = None  # the instance that the SDK has made

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.jobs_fetcher = self._take
        self.jobs_handler = self._handle
        self.stop_signals_fetcher = self._fetch_stops
        self._draining = asyncio.Event()
        self._poll: asyncio.Timeout | None = None  # of the open request for jobs
        self._backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        self._waiting: dict[str, bool] = {}  # ids of jobs not yet begun -> whether stopped
        self._finished = asyncio.Event()  # all jobs are done and no more will come
        type(self).current = self

    @classmethod
    def install(cls, drain_seconds: float) -> None:
        """Make `runpod.serverless.start` use this class, and post results by `wire.post`."""
        cls.drain_seconds = drain_seconds
        rp_scale.JobScaler = cls
        rp_http._transmit = wire.post

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):  # in place of the SDK's, set in `start`
            loop.add_signal_handler(number, self.drain)
        await super().run()

    def drain(self) -> None:
        """Finish the jobs under way, and those that an open request still brings, and then end.

        Must be called on the event loop.
        """
        if self._draining.is_set():
            return
        log.info("draining: jobs under way are finished, no new ones are asked for")
        self._draining.set()
        if self._poll is not None:
            self._poll.reschedule(asyncio.get_running_loop().time() + self.drain_seconds)

    async def set_scale(self) -> None:
        """Called before jobs are asked for: wait until there is room for one."""
        await super().set_scale()
        while self.current_occupancy() >= self.current_concurrency:
            await asyncio.sleep(POLL_SECONDS)

    async def _take(self, session: Session, num_jobs: int) -> list[WireJob] | None:
        """Request jobs; while draining, end the loop instead, for no request is open now.

        The loop ends only after the last job: as long as it lives, the SDK learns from the platform
        which jobs are to be stopped.
        """
        if self._draining.is_set():
            while self.current_occupancy():
                await asyncio.sleep(0.1)
            self.kill_worker()
            return None
        started = time.monotonic()
        try:
            async with asyncio.timeout(None) as self._poll:
                jobs = self._usable(await wire.take(session, num_jobs))
        except TimeoutError:  # set by `drain`, or aiohttp's
            return None
        except TooManyRequests:
            raise  # the SDK waits for 5 seconds
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            log.error("no jobs can be taken now: %s: %s", type(exc).__name__, exc)
            await self._rest(self._backoff.next_pause())
            return None
        finally:
            self._poll = None
        self._backoff.reset()
        if not jobs:
            await self._rest(started + EMPTY_PAUSE - time.monotonic())
        return jobs

    async def _rest(self, seconds: float) -> None:
        """Wait so many seconds, or until draining begins."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._draining.wait()

    def _usable(self, jobs: list[Any]) -> list[WireJob]:
        """The jobs without those that would kill the SDK's loop or that it would run twice."""
        usable = []
        for job in jobs:
            job_id = job.get("id") if isinstance(job, dict) else None
            if not isinstance(job_id, str) or not job_id.isprintable() or not job_id:
                log.error("a job without a usable id came: it cannot be run, nor its end be told")
            elif job_id in self._waiting or self.job_progress.get(job_id) is not None:
                log.warning("job %s came again while it is under way; it is run once", job_id)
            else:
                self._waiting[job_id] = False
                usable.append({key: job[key] for key in KEYS if key in job})
        return usable

    async def _handle(self, session: Session, config: dict[str, Any], job: WireJob) -> None:
        if self._waiting.pop(job["id"], False):
            log.info("job %s was stopped before its turn", job["id"])
        else:
            await handle_job(session, config, job)

    async def stop_job(self, job_id: str) -> bool:
        if job_id in self._waiting:  # it is still in the SDK's queue, or its task has not begun
            self._waiting[job_id] = True
            return True
        return bool(await super().stop_job(job_id))

    async def run_jobs(self, session: Session) -> None:
        try:
            await super().run_jobs(session)
        finally:
            self._finished.set()

    async def _fetch_stops(self, session: Session) -> list[str]:
        """The ids of jobs that the platform wants stopped. Returns early when all jobs are done.

        The SDK's own waits until the platform answers, which keeps a worker without jobs from
        ending for up to 90 seconds.
        """
        asking = asyncio.ensure_future(get_stop_signals(session))
        finished = asyncio.ensure_future(self._finished.wait())
        try:
            await asyncio.wait({asking, finished}, return_when=asyncio.FIRST_COMPLETED)
            stops: list[str] = asking.result() if asking.done() else []
            return stops
        finally:
            asking.cancel()
            finished.cancel()
