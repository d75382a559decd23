"""Who may come in: counts the requests that are unfinished, and refuses those that have no place.

Whoever is refused is told when there will be one, by what the engine expects. Knows nothing of how
images are made.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from math import isinf

from sdbento.access.caller import Caller, current_caller
from sdbento.access.limits import ImagesAtOnce, Places, has_place
from sdbento.engine.forecast import Ending
from sdbento.metrics.definitions import queue_depth
from sdbento.request.schema import MAX_IMAGES, GenerateRequest
from sdbento.settings import Settings

IMAGES_PER_REQUEST = 4  # unfinished ones, on average: the engine looks at all of them at each step
LEAST_IMAGES = 4 * MAX_IMAGES  # however few requests may wait
UNKNOWN = 5.0  # seconds until the next try, where nobody knows when anything under way ends


class Admission:
    """The places of requests and of their images, shared between callers. For one event loop.

    `endings`: when the requests under way will be done, the first one first. `num_devices`: each
    has a batch of its own.
    """

    def __init__(
        self, settings: Settings, endings: Callable[[], Sequence[Ending]], num_devices: int = 1
    ) -> None:
        batch = settings.max_batch_size * num_devices
        self._requests, self._images = _places(settings.max_queue_size, batch, num_devices)
        self._images_at_once = ImagesAtOnce()
        self._endings = endings
        self._num_running = batch

    @property
    def num_requests(self) -> int:
        """How many are unfinished."""
        return self._requests.total

    @asynccontextmanager
    async def admitted(self, *requests: GenerateRequest) -> AsyncIterator[None]:
        """Count requests that are made one after another, as one; refuse it when too many, or too
        many images, are unfinished."""
        caller = current_caller()
        num_images = [request.num_images for request in requests]
        until = partial(self._seconds_until_images, caller.owner)
        async with self.counted(max(num_images)):
            with self._images_at_once.hold(caller, sum(num_images), until):
                yield

    @asynccontextmanager
    async def counted(self, num_images: int = 0) -> AsyncIterator[None]:
        """Count a request of the present caller. Raises Overloaded when there is no room."""
        caller = current_caller()
        self._check_room(caller, num_images)
        self._count(caller.owner, 1, num_images)
        try:
            yield
        finally:
            self._count(caller.owner, -1, -num_images)

    def _check_room(self, caller: Caller, num_images: int) -> None:
        """Raises Overloaded, at once, when the queue is full, or this caller's share of it."""
        if (full := self._full_for(caller, num_images)) is not None:
            places, number = full
            error = places.refusal(caller)
            error.retry_after = self._seconds_until_place(places, caller, number)
            raise error

    def _full_for(self, caller: Caller, num_images: int) -> tuple[Places, int] | None:
        """What has no room for another request with so many images, and how many it takes of it."""
        for places, number in ((self._requests, 1), (self._images, num_images)):
            if number and not places.has_room(caller, number):
                return places, number
        return None

    def seconds_until_end(self, owner: str | None) -> float:
        """Seconds until a request of `owner` will have ended, or where he has none, of anybody."""
        endings = self._endings()
        mine = [ending for ending in endings if ending.owner == owner]
        return _seconds_until(next(iter(mine or endings), None))

    def _seconds_until_place(self, places: Places, caller: Caller, number: int) -> float:
        """Seconds until so much will have ended that `caller` has that many places."""
        taken, ending = places.taken.copy(), None
        for ending in self._endings():
            given_back = ending.num_images if places is self._images else 1
            taken -= Counter({ending.owner: given_back})
            if has_place(caller, taken, places.limit, number):
                break
        return _seconds_until(ending)

    def _seconds_until_images(self, owner: str | None, num_images: int) -> float:
        """Seconds until so many images of `owner` will have ended."""
        ending = None
        for ending in self._endings():
            if ending.owner == owner and (num_images := num_images - ending.num_images) <= 0:
                break
        return _seconds_until(ending)

    def _count(self, owner: str | None, num_requests: int, num_images: int) -> None:
        self._requests.change(owner, num_requests)
        self._images.change(owner, num_images)
        queue_depth.set(max(0, self.num_requests - self._num_running))


def _places(queue: int, batch: int, num_devices: int) -> tuple[Places, Places]:
    """Of requests, and of their images."""
    num_requests = queue + batch
    num_images = max(IMAGES_PER_REQUEST * num_requests, LEAST_IMAGES)
    each = f" on each of {num_devices} devices" if num_devices > 1 else ""
    sizes = f"MAX_QUEUE_SIZE={queue} beside MAX_BATCH_SIZE={batch // num_devices}{each}"
    return (
        Places(
            num_requests,
            what=f"the queue ({sizes})",
            full=f"the queue is full: {{}} requests are unfinished ({sizes})",
        ),
        Places(
            num_images,
            what=f"the {num_images} images of the queue ({sizes})",
            full=f"the queue is full: {{}} of {num_images} images are unfinished ({sizes})",
        ),
    )


def _seconds_until(ending: Ending | None) -> float:
    if ending is None or isinf(ending.at):
        return UNKNOWN
    return max(1.0, ending.at - time.monotonic())
