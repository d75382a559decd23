"""What a watcher is told of the running batch: values, which are its JSON as well.

Images that may share UNet calls are in one lane. Requests have numbers, in the order in which the
engine took them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reason = Literal["done", "ended", "paused"]


@dataclass(frozen=True)
class BatchImage:
    """Image `image` of a request, which has begun; `step` of `num_steps` are done.

    rows: its part of its lane's last UNet call, 2 with guidance; 0: it took no part in it. joined:
    it took part, and did not in the snapshot before.
    """

    request: int
    image: int
    step: int
    num_steps: int
    rows: int
    joined: bool


@dataclass(frozen=True)
class Lane:
    """Images of one model and size, which may share UNet calls; `rows` and `seconds` of the last
    call for them, null if there was none yet.

    model: null where another uses one that the watcher could not see otherwise. current: the last
    call of its device was this lane's. device: the number of the one that computes it, null where
    there is only one.
    """

    model: str | None
    width: int
    height: int
    text_chunks: int
    token_merging_ratio: float
    rows: int | None
    seconds: float | None
    current: bool
    images: tuple[BatchImage, ...]
    device: int | None = None


@dataclass(frozen=True)
class BatchRequest:
    """An unfinished request. Of others' requests a watcher learns neither prompt nor LoRAs.

    prompt: how it begins; null: another's. num_waiting: images that have not begun. num_done:
    images whose steps are all done. eta: seconds until the request is done; null: nobody knows yet.
    """

    number: int
    yours: bool
    prompt: str | None
    sampler: str | None
    loras: tuple[str, ...]
    num_loras: int
    num_controlnets: int
    num_images: int
    num_waiting: int
    num_done: int
    waited: float
    eta: float | None


@dataclass(frozen=True)
class Left:
    """An image that took part in the snapshot before, and does so no more.

    done: its steps are. ended: its request failed or was cancelled. paused: others go first.
    """

    request: int
    image: int
    reason: Reason


@dataclass(frozen=True)
class Recent:
    """The UNet calls of late: how many of them these figures are of, and their means."""

    calls: int
    rows: float
    images: float
    seconds: float


@dataclass(frozen=True)
class Queue:
    """What is unfinished. preparing: requests that wait for models, LoRAs or images of other hosts;
    the others are `requests`, with so many images, of which `waiting` have not begun. eta: seconds
    until all of them are done; null: nobody knows yet.
    """

    preparing: int
    requests: int
    images: int
    waiting: int
    eta: float | None


@dataclass(frozen=True)
class ResidentModel:
    """A model or ControlNet in memory; `name` is null where the watcher may not see it. device:
    whose memory, null where there is only one."""

    name: str | None
    kind: Literal["model", "controlnet"]
    memory_gb: float
    device: int | None = None


@dataclass(frozen=True)
class Device:
    """What computes, each with a batch of its own. alive: it can; if not, it is being started."""

    number: int
    name: str
    alive: bool


@dataclass(frozen=True)
class Batch:
    """A snapshot of the running batch at `time` (seconds since 1970).

    number: of the snapshot; one who reads slowly misses some. calls: UNet calls until now. Both are
    counted since somebody watches. A snapshot may come after several quick calls.
    """

    number: int
    time: float
    calls: int
    recent: Recent | None
    queue: Queue
    lanes: tuple[Lane, ...]
    requests: tuple[BatchRequest, ...]
    left: tuple[Left, ...]
    models: tuple[ResidentModel, ...]
    devices: tuple[Device, ...] = ()
    event: Literal["batch"] = "batch"
