"""The RunPod SDK's own job loop, with an end that loses no job.

As it is (1.12.0, serverless/modules/rp_scale.py), SIGTERM ends the loop that runs jobs while a
request for jobs is still open; what that request brings is queued and never run, nor reported.
Here the order is: the open request for jobs ends, what it brought is run, all jobs finish, and only
then does the loop shut down. The SDK (modules/rp_http.py) posts a result again after an HTTP 500
but not after a broken connection: here after both. And it ends with all its jobs when one of a
batch has no id, and runs one twice that comes twice. Knows nothing of what a job is.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

import aiohttp
from aiohttp_retry import FibonacciRetry
from runpod.serverless.modules import rp_http, rp_scale
from runpod.serverless.modules.rp_job import get_job, get_stop_signals

log = logging.getLogger(__name__)

POST_ATTEMPTS = 6  # with pauses of 2, 3, 5, 8 and
LAST_PAUSE = 10.0  # seconds
BROKEN = {aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError}

Session = Any  # aiohttp's
Job = dict[str, Any]


class DrainingScaler(rp_scale.JobScaler):  # type: ignore[misc]  # the SDK is untyped
    """`JobScaler` that drains on SIGTERM and SIGINT, and when `drain` is called.

    It replaces the SDK's class by `install`; the two fetchers are attributes that the SDK itself
    replaces in local tests.
    """

    drain_seconds = 30.0  # both set by `install`
    current: DrainingScaler | None = None

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.jobs_fetcher = self._take
        self.stop_signals_fetcher = self._hear_stops
        self._draining = False
        self._poll: asyncio.Timeout | None = None  # of the open request for jobs
        self._finished = asyncio.Event()  # all jobs are done and no more will come
        type(self).current = self

    @classmethod
    def install(cls, drain_seconds: float) -> None:
        """Let `runpod.serverless.start` use this class, and post results until they are heard."""
        cls.drain_seconds = drain_seconds
        rp_scale.JobScaler = cls
        rp_http.FibonacciRetry = retries

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):  # in place of the SDK's, set in `start`
            loop.add_signal_handler(number, self.drain)
        await super().run()

    def drain(self) -> None:
        """Take no more jobs but those that are on their way; then finish and end. On the loop."""
        if self._draining:
            return
        log.info("draining: jobs under way are finished, no new ones are asked for")
        self._draining = True
        if self._poll is not None:
            self._poll.reschedule(asyncio.get_running_loop().time() + self.drain_seconds)

    async def _take(self, session: Session, num_jobs: int) -> list[Job] | None:
        """Ask for jobs; while draining, end the loop instead: no request for jobs is open now.

        It ends when all jobs have: while it is alive, the SDK also asks which are to be stopped.
        """
        if self._draining:
            while self.current_occupancy():
                await asyncio.sleep(0.1)
            self.kill_worker()
            return None
        try:
            async with asyncio.timeout(None) as self._poll:
                return self._usable(await get_job(session, num_jobs) or [])
        except TimeoutError:
            if self._poll is not None and self._poll.expired():  # set by `drain`
                return None
            raise
        finally:
            self._poll = None

    def _usable(self, jobs: list[Any]) -> list[Job]:
        """The jobs but those that the SDK's loop would die of or run twice."""
        known = set((self.job_progress.get_job_list() or "").split(","))
        usable = []
        for job in jobs:
            job_id = job.get("id") if isinstance(job, dict) else None
            if not isinstance(job_id, str) or not job_id:
                log.error("a job without an id came: it cannot be run, nor its end be told")
            elif job_id in known:
                log.warning("job %s came again while it is under way; it is run once", job_id)
            else:
                known.add(job_id)
                usable.append(job)
        return usable

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


def retries(**_: Any) -> FibonacciRetry:
    """What the SDK asks for when it posts: it lists no exceptions, and then none is retried."""
    return FibonacciRetry(attempts=POST_ATTEMPTS, max_timeout=LAST_PAUSE, exceptions=BROKEN)
