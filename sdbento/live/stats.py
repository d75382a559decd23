"""What runs now, in few numbers: values, which are the JSON of GET /stats as well.

They are counted in a snapshot of the batch as a watcher sees it, so they tell no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdbento.live.batch import Batch, Device, Lane, Recent, ResidentModel


@dataclass(frozen=True)
class RequestStats:
    """Unfinished requests. preparing: they wait for models, LoRAs or images of other hosts.
    waiting: no image of theirs has begun. running: all others."""

    preparing: int
    waiting: int
    running: int


@dataclass(frozen=True)
class ImageStats:
    """Unfinished images of the requests that are not being prepared: those that have not begun, and
    the others."""

    waiting: int
    running: int


@dataclass(frozen=True)
class LaneStats:
    """So many images of one model and size, which share UNet calls; rows and seconds (of a step) of
    the last call for them, null if none was seen.

    model: null where others use one that the caller could not see otherwise. device: the number of
    the one that computes it, null where there is only one.
    """

    model: str | None
    width: int
    height: int
    images: int
    rows: int | None
    seconds: float | None
    device: int | None = None


@dataclass(frozen=True)
class MemoryStats:
    """Main memory in GB of 2**30 bytes: what this process takes, how much there is, and is free. In
    a container: of what the container may use."""

    process: float
    total: float
    free: float


@dataclass(frozen=True)
class Stats:
    """uptime: seconds since the process started. eta: seconds until all that is unfinished is done;
    null: nobody knows yet. calls: the UNet calls of late; null: there were none. jobs: the caller's
    jobs of /run by status; null: their store cannot be asked now."""

    version: str
    uptime: float
    ready: bool
    requests: RequestStats
    images: ImageStats
    eta: float | None
    calls: Recent | None
    lanes: tuple[LaneStats, ...]
    models: tuple[ResidentModel, ...]
    devices: tuple[Device, ...]
    memory: MemoryStats
    jobs: Mapping[str, int] | None


def stats_of(
    batch: Batch,
    *,
    version: str,
    uptime: float,
    ready: bool,
    memory: MemoryStats,
    jobs: Mapping[str, int] | None,
) -> Stats:
    """The snapshot in numbers, with what it does not tell of the server."""
    queue = batch.queue
    num_running = sum(one.num_waiting < one.num_images for one in batch.requests)
    return Stats(
        version=version,
        uptime=round(uptime, 1),
        ready=ready,
        requests=RequestStats(queue.preparing, queue.requests - num_running, num_running),
        images=ImageStats(queue.waiting, queue.images - queue.waiting),
        eta=queue.eta,
        calls=batch.recent,
        lanes=tuple(map(_lane, batch.lanes)),
        models=batch.models,
        devices=batch.devices,
        memory=memory,
        jobs=jobs,
    )


def _lane(lane: Lane) -> LaneStats:
    return LaneStats(
        model=lane.model,
        width=lane.width,
        height=lane.height,
        images=len(lane.images),
        rows=lane.rows,
        seconds=lane.seconds,
        device=lane.device,
    )
