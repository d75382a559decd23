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
    """One call, which may be seen and interrupted from the moment it has come in.

    Its `num_images` images have consecutive seeds. They are made in requests of at most 16, one
    after another, so that a call takes no more room than a request; all are admitted at once, lest
    a call that has begun be refused in the middle.
    """

    def __init__(self, app: App, job: str, num_images: int) -> None:
        self.job = job
        self.num_images = num_images
        self.num_steps = 0  # of each image; 0 until one has been done
        self.interrupted = False
        self.preview: Image.Image | None = None  # of an image that is being made
        self._app = app
        self._steps_done = [0] * num_images
        self._responses: list[GenerateResponse] = []
        self._eta = 0.0  # seconds until the present request is done
        self._began = 0.0  # the present request; monotonic seconds
        self._task: asyncio.Task[None] | None = None
        self._handle: Handle | None = None  # of the present request, once the engine has it
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
        """Seconds until all is done, as far as that is known: later images take as long as those
        that are being made."""
        left = self.num_images - MAX_IMAGES * len(self._responses)
        if left <= MAX_IMAGES:
            return self._eta
        seconds = time.monotonic() - self._began + self._eta
        return self._eta + seconds * (left / MAX_IMAGES - 1)

    async def run(self, request: GenerateRequest) -> list[GenerateResponse]:
        """Images like those of `request`, which has the first one's seed, as far as they are
        finished: all, unless the call was or is interrupted."""
        if self.interrupted:
            return []
        try:
            async with asyncio.TaskGroup() as group:  # a task that can be cancelled by itself
                self._task = group.create_task(self._follow(_split(request, self.num_images)))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return self._responses

    def interrupt(self) -> None:
        """Stop what is not finished."""
        self.interrupted = True
        if self._task is not None:
            self._task.cancel()

    def watch(self) -> None:
        """Make previews for a while, for somebody who looks at them."""
        self._watched_until = time.monotonic() + WATCHED
        self._set_previews()

    async def _follow(self, requests: list[GenerateRequest]) -> None:
        self._began = time.monotonic()
        events = self._app.stream(*requests, on_start=self._note_start)
        async with aclosing(events):
            async for event in events:
                match event:
                    case Queued(eta=float(eta)):
                        self._eta = eta
                    case Stepped():
                        self._note_step(event)
                    case Done(response):
                        self._responses.append(response)
                        self._eta, self._began = 0.0, time.monotonic()

    def _note_start(self, handle: Handle) -> None:
        self._handle = handle
        self._set_previews()

    def _note_step(self, event: Stepped) -> None:
        self._eta = event.eta
        self._steps_done[MAX_IMAGES * len(self._responses) + event.image] = event.step
        is_first, self.num_steps = self.num_steps == 0, event.num_steps
        if event.preview is not None:
            self.preview = event.preview
        if is_first or event.preview is not None:
            self._set_previews()

    def _set_previews(self) -> None:
        """A preview costs every step that makes one, so there are none unless somebody looks."""
        if self._handle is not None and self.num_steps:
            watched = time.monotonic() < self._watched_until
            self._handle.preview_every(max(1, self.num_steps // PREVIEWS) if watched else 0)


class Work:
    """The calls under way. Callers see and interrupt their own only."""

    def __init__(self) -> None:
        self._running: defaultdict[str | None, list[Generation]] = defaultdict(list)

    def of_caller(self) -> list[Generation]:
        """The present caller's, oldest first."""
        return list(self._running.get(current_caller().owner, ()))

    @contextmanager
    def listing(self, generation: Generation) -> Iterator[None]:
        """List a call of the present caller for as long as it runs."""
        owner = current_caller().owner
        self._running[owner].append(generation)
        try:
            yield
        finally:
            self._running[owner].remove(generation)
            if not self._running[owner]:
                del self._running[owner]


def _split(request: GenerateRequest, num_images: int) -> list[GenerateRequest]:
    parts = []
    for first in range(0, num_images, MAX_IMAGES):
        changed = {"num_images": min(MAX_IMAGES, num_images - first)}
        if request.seed is not None:
            changed["seed"] = request.seed + first
        parts.append(request.model_copy(update=changed))
    return parts
