"""The RunPod SDK's own job loop, with an end that loses no job.

As it is (1.12.0, serverless/modules/rp_scale.py), SIGTERM ends the loop that runs jobs while a
request for jobs is still open; what that request brings is queued and never run, nor reported.
Here the order is: the open request for jobs ends, what it brought is run, all jobs finish, and only
then does the loop shut down. The SDK also ends with all its jobs when one of a batch has no id, and
runs one twice that comes twice, and one that is stopped before its turn. It asks a platform that is
away a thousand times a second, and a full worker waits up to a second after a job's end before it
asks for the next. Knows nothing of what a job is.
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

from sdbento.doors.runpod import wire
from sdbento.doors.runpod.wire import Session

log = logging.getLogger(__name__)

KEYS = ("id", "input", "batchId")  # of a job, that are used; others could confuse the SDK
FIRST_PAUSE, LAST_PAUSE = 0.5, 5.0  # seconds until jobs are asked for again after an error
BREATH = 0.1  # seconds between two requests for jobs that are answered at once with none
WATCH = 0.02  # seconds between two looks whether there is room for another job

Job = dict[str, Any]


class DrainingScaler(rp_scale.JobScaler):  # type: ignore[misc]  # the SDK is untyped
    """`JobScaler` that drains on SIGTERM and SIGINT, and when `drain` is called.

    It replaces the SDK's class by `install`; the two fetchers and the handler are attributes that
    the SDK itself replaces in local tests.
    """

    drain_seconds = 20.0  # set by `install`
    current: DrainingScaler | None = None  # the one that the SDK has made

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.jobs_fetcher = self._take
        self.jobs_handler = self._handle
        self.stop_signals_fetcher = self._hear_stops
        self._draining = asyncio.Event()
        self._poll: asyncio.Timeout | None = None  # of the open request for jobs
        self._pause = 0.0  # seconds after the next error; 0: the last request had none
        self._waiting: dict[str, bool] = {}  # jobs whose turn has not come -> whether stopped
        self._finished = asyncio.Event()  # all jobs are done and no more will come
        type(self).current = self

    @classmethod
    def install(cls, drain_seconds: float) -> None:
        """Let `runpod.serverless.start` use this class, and post results until they are heard."""
        cls.drain_seconds = drain_seconds
        rp_scale.JobScaler = cls
        rp_http._transmit = wire.post

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):  # in place of the SDK's, set in `start`
            loop.add_signal_handler(number, self.drain)
        await super().run()

    def drain(self) -> None:
        """Take no more jobs but those that are on their way; then finish and end. On the loop."""
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
            await asyncio.sleep(WATCH)

    async def _take(self, session: Session, num_jobs: int) -> list[Job] | None:
        """Ask for jobs; while draining, end the loop instead: no request for jobs is open now.

        It ends when all jobs have: while it is alive, the SDK also asks which are to be stopped.
        """
        if self._draining.is_set():
            while self.current_occupancy():
                await asyncio.sleep(0.1)
            self.kill_worker()
            return None
        asked = time.monotonic()
        try:
            async with asyncio.timeout(None) as self._poll:
                jobs = self._usable(await wire.take(session, num_jobs))
        except TimeoutError:  # set by `drain`, or aiohttp's
            return None
        except TooManyRequests:
            raise  # the SDK waits for 5 seconds
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            self._pause = min(2 * self._pause or FIRST_PAUSE, LAST_PAUSE)
            log.error("no jobs can be taken now: %s: %s", type(exc).__name__, exc)
            await self._rest(self._pause)
            return None
        finally:
            self._poll = None
        self._pause = 0.0
        if not jobs:
            await self._rest(asked + BREATH - time.monotonic())
        return jobs

    async def _rest(self, seconds: float) -> None:
        """Wait, unless it is time to drain."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._draining.wait()

    def _usable(self, jobs: list[Any]) -> list[Job]:
        """The jobs but those that the SDK's loop would die of or run twice."""
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

    async def _handle(self, session: Session, config: dict[str, Any], job: Job) -> None:
        if self._waiting.pop(job["id"], False):
            log.info("job %s was stopped before its turn", job["id"])
        else:
            await handle_job(session, config, job)

    async def stop_job(self, job_id: str) -> bool:
        if job_id in self._waiting:  # its task, if there is one, has not yet begun
            self._waiting[job_id] = True
            return True
        return bool(await super().stop_job(job_id))

    async def run_jobs(self, session: Session) -> None:
        try:
            await super().run_jobs(session)
        finally:
            self._finished.set()

    async def _hear_stops(self, session: Session) -> list[str]:
        """Ids of jobs to stop; gives up asking when no job can be left, lest the end waits for it.

        The SDK lets this request run to its own end, up to 90 s after the last job.
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
