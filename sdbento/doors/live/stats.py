"""GET /stats: what runs now, in few numbers. GET /batch tells of each image."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing, suppress

import psutil
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from sdbento import __version__
from sdbento.doors.http.routing import TheApp, door
from sdbento.doors.live.api import is_through_proxy
from sdbento.doors.runpod.lifespan import running_jobs
from sdbento.errors import SDBentoError
from sdbento.live.batch import Batch
from sdbento.live.stats import MemoryStats, Stats, stats_of

router = door("Batch")

PATIENCE = 1.0  # seconds for a UNet call to come, while images are made
GB = 2**30


@router.get("/stats")
async def stats(request: Request, app: TheApp) -> Stats:
    """What runs now: requests, images, UNet calls, models, memory, jobs.

    It tells what `/batch` tells to the same caller. Calls are counted only while somebody looks, so
    while images are made the answer waits for the next one, for up to a second.
    """
    return stats_of(
        await _snapshot(app, request),
        version=__version__,
        uptime=time.time() - psutil.Process().create_time(),
        ready=app.ready,
        memory=await run_in_threadpool(_memory),
        jobs=await _jobs(request),
    )


async def _snapshot(app: TheApp, request: Request) -> Batch:
    """With figures of recent calls where there are any."""
    async with aclosing(app.watch(has_own=not is_through_proxy(request))) as batches:
        batch: Batch = await anext(batches)
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while batch.queue.images and batch.recent is None:
                    batch = await anext(batches)
        return batch


def _memory() -> MemoryStats:
    from sdbento.models.device import host_memory

    total, available = host_memory()
    process = psutil.Process().memory_info().rss
    sizes = (process, total, max(0, available))
    return MemoryStats(*(round(size / GB, 3) for size in sizes))


async def _jobs(request: Request) -> Mapping[str, int] | None:
    if (jobs := running_jobs(request.app)) is None:
        return None
    try:
        by_status = (await jobs.counts()).by_status
        return {str(status): count for status, count in by_status.items()}
    except SDBentoError:
        return None
