"""Runs jobs for as long as the job routes are served; opens their store, again if that fails.

Knows nothing of the routes themselves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from starlette.applications import Starlette

from sdbento.background import Problem, start_task
from sdbento.backoff import Backoff
from sdbento.doors.http.termination import LIMIT, give_up_in_time, on_termination
from sdbento.doors.runpod.a1111_calls import answer
from sdbento.errors import SDBentoError
from sdbento.jobs.delivery.bucket import Bucket
from sdbento.jobs.fleet.bucket_results import BucketResults
from sdbento.jobs.results import Results
from sdbento.jobs.service import Jobs
from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.store.room import Limits
from sdbento.settings import Settings

if TYPE_CHECKING:
    from sdbento.app import App

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 2.0, 10.0  # seconds between two attempts to open the job store


@asynccontextmanager
async def run_jobs(routes: Starlette) -> AsyncIterator[None]:
    """Run jobs on the App in `state.app` for as long as the routes are served: their lifespan.

    If the job store cannot be opened (its database is away, another server still has its folder),
    the job routes answer 503 and opening is tried again in the background; other routes work.
    """
    opening, problem = None, Problem(log)
    if not await _open(routes, problem):
        opening = start_task(
            _open_later(routes, problem),
            "sdbento opening of the job store",
            lambda: routes.state.app.report_broken("the job store is not opened any more"),
        )
    try:
        limit = routes.state.app.settings.shutdown_timeout + LIMIT
        with on_termination(partial(_prepare_to_stop, routes), limit):
            yield
    finally:
        if opening is not None:
            opening.cancel()
            await asyncio.wait([opening])
        if (jobs := running_jobs(routes)) is not None:
            await jobs.stop()


def running_jobs(routes: Starlette) -> Jobs | None:
    """The jobs that `run_jobs` runs; None while the job store could not be opened."""
    jobs: Jobs | None = routes.state.jobs
    return jobs


def _prepare_to_stop(routes: Starlette) -> None:
    if (jobs := running_jobs(routes)) is not None:
        jobs.prepare_to_stop()
    routes.state.app.watchers.close()
    give_up_in_time(routes.state.app)


async def _open_later(routes: Starlette, problem: Problem) -> None:
    backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
    while True:
        await asyncio.sleep(backoff.next_pause())
        if await _open(routes, problem):
            log.info("jobs can be kept again")
            return


async def _open(routes: Starlette, problem: Problem) -> bool:
    """Try to open the job store and start its jobs: `state.jobs`, None if that fails.

    Returns whether it succeeded.
    """
    routes.state.jobs = None
    try:
        routes.state.jobs = await _start_jobs(routes.state.app, routes)
    except Exception as exc:
        reason = exc.message if isinstance(exc, SDBentoError) else str(exc).partition("\n")[0]
        problem.note(f"jobs cannot be kept (JOB_STORE_URL, SDBENTO_STATE_DIR), so 503: {reason}")
        return False
    return True


async def _start_jobs(app: App, routes: Starlette) -> Jobs:
    store = await asyncio.to_thread(_open_store, app.settings)
    try:
        jobs = Jobs(app, store, app.settings, answer_call=partial(answer, routes))
        await jobs.start()
    except BaseException:
        await asyncio.to_thread(store.close)  # frees its locks for the next attempt
        raise
    return jobs


def _open_store(settings: Settings) -> JobStore:
    url = settings.job_store_url
    bucket = Bucket.configured(settings) if settings.job_results == "bucket" else None
    folder = settings.job_results_dir or settings.state_dir
    return JobStore(
        settings.state_dir,
        url.get_secret_value() if url is not None else None,
        results=Results(folder / "results") if bucket is None else BucketResults(bucket),
        limits=Limits(max_unfinished=settings.max_jobs),
    )
