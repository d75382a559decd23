"""What is under way through this door, by caller: its progress, and a way to interrupt it.

Knows nothing of HTTP, nor of the web UI's names for things.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

from PIL import Image

from sdbento.access.caller import current_caller
from sdbento.engine.handle import Handle, Stepped
from sdbento.request.events import Done, Queued
from sdbento.request.schema import MAX_IMAGES, GenerateRequest, GenerateResponse

if TYPE_CHECKING:
    from sdbento.app import App

WATCHED = 10.0  # seconds for which somebody who has asked for a preview is taken to wait for more
PREVIEWS = 10  # of an image, at most


class Generation:
    """One call: `num_images` images like those of `request`, in requests of at most 16 images.

    They have consecutive seeds; `request` has that of the first. They run at the same time; if one
    of them fails, so does the call, and the others are cancelled.
    """

    def __init__(self, app: App, job: str, request: GenerateRequest, num_images: int) -> None:
        self.job = job
        self.num_images = num_images
        self.num_steps = 0  # of each image; 0 until one has been done
        self.interrupted = False
        self.preview: Image.Image | None = None  # of the first image
        self._app = app
        self._requests = _split(request, num_images)
        self._steps_done = [0] * num_images
        self._etas = [0.0] * len(self._requests)
        self._tasks: list[asyncio.Task[GenerateResponse]] = []
        self._first: Handle | None = None  # of the first request, once the engine has it
        self._watched_until = 0.0  # monotonic seconds

    @property
    def progress(self) -> float:
        """The share of all steps that has been done."""
        return sum(self._steps_done) / (self.num_images * self.num_steps or 1)

    @property
    def step(self) -> int:
        """Steps that an image has done, on average."""
        return sum(self._steps_done) // self.num_images

    @property
    def num_finished(self) -> int:
        return self._steps_done.count(self.num_steps) if self.num_steps else 0

    @property
    def eta(self) -> float:
        """Seconds until all is done, as far as that is known."""
        return max(self._etas)

    async def run(self) -> list[GenerateResponse]:
        """What is finished, in order: everything, unless the call is interrupted meanwhile."""
        try:
            async with asyncio.TaskGroup() as group:
                self._tasks = [
                    group.create_task(self._follow(i, request))
                    for i, request in enumerate(self._requests)
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in self._tasks if not task.cancelled()]

    def interrupt(self) -> None:
        """Stop what is not finished."""
        self.interrupted = True
        for task in self._tasks:
            task.cancel()

    def watch(self) -> None:
        """Make previews for a while, for somebody who looks at them."""
        self._watched_until = time.monotonic() + WATCHED
        self._set_previews()

    async def _follow(self, number: int, request: GenerateRequest) -> GenerateResponse:
        on_start = self._note_start if number == 0 else lambda _: None
        async with aclosing(self._app.stream(request, on_start)) as events:
            async for event in events:
                match event:
                    case Queued(eta=float(eta)):
                        self._etas[number] = eta
                    case Stepped():
                        self._note_step(number, event)
                    case Done(response):
                        self._etas[number] = 0.0
                        return response
        raise AssertionError("a stream of events ends with Done, or raises")

    def _note_start(self, handle: Handle) -> None:
        self._first = handle
        self._set_previews()

    def _note_step(self, number: int, event: Stepped) -> None:
        self._etas[number] = event.eta
        self._steps_done[number * MAX_IMAGES + event.image] = event.step
        self.num_steps = event.num_steps
        if event.preview is not None:
            self.preview = event.preview
            self._set_previews()

    def _set_previews(self) -> None:
        """A preview costs every step that makes one, so there are none unless somebody looks."""
        if self._first is not None:
            watched = time.monotonic() < self._watched_until
            steps = self._first.trajectories[0].steps_in_all
            self._first.preview_every(max(1, steps // PREVIEWS) if watched else 0)


class Work:
    """The calls under way. Callers see and interrupt their own only."""

    def __init__(self) -> None:
        self._running: defaultdict[str | None, list[Generation]] = defaultdict(list)

    def of_caller(self) -> list[Generation]:
        """The present caller's, oldest first."""
        return list(self._running.get(current_caller().name, ()))

    @contextmanager
    def listing(self, generation: Generation) -> Iterator[None]:
        """List a call of the present caller for as long as it runs."""
        name = current_caller().name
        self._running[name].append(generation)
        try:
            yield
        finally:
            self._running[name].remove(generation)
            if not self._running[name]:
                del self._running[name]


def _split(request: GenerateRequest, num_images: int) -> list[GenerateRequest]:
    parts = []
    for first in range(0, num_images, MAX_IMAGES):
        changed = {"num_images": min(MAX_IMAGES, num_images - first)}
        if request.seed is not None:
            changed["seed"] = request.seed + first
        parts.append(request.model_copy(update=changed))
    return parts
