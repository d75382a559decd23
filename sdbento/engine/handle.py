"""A request in the engine, for whoever submitted it: its end, its events, a way to cancel it.

Knows nothing of planning or computing; the engine's thread fills it in.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdbento.engine.trajectory import Trajectory, image_of

if TYPE_CHECKING:
    from PIL import Image

    from sdbento.engine.trajectory import Stage

MAX_PREVIEWS = 8  # that wait for one listener


@dataclass(frozen=True)
class Estimated:
    """What the engine expects when somebody begins to listen: `eta` seconds until all is done."""

    eta: float


@dataclass(frozen=True)
class Stepped:
    """Image `image` of the request has done `step` of `num_steps` steps, those of all passes."""

    image: int
    step: int
    num_steps: int
    eta: float
    preview: Image.Image | None = None


EngineEvent = Estimated | Stepped


@dataclass
class Calls:
    """The calls of one stage that images of a request took part in: when the first began and the
    last ended (monotonic seconds), how many they were, how long the device took for them, and how
    many rows, or images, they computed in all, those of other requests too."""

    began: float
    ended: float
    number: int = 0
    seconds: float = 0.0
    size: int = 0

    def add(self, ended: float, seconds: float, size: int) -> None:
        self.ended = ended
        self.number += 1
        self.seconds += seconds
        self.size += size


class Handle:
    """One request under way.

    `cancel` and `request_estimate` reach the engine, from any thread. `number`: in the order in
    which requests were submitted. `about`: what whoever has submitted it says of it to those who
    observe the engine, which does not read it.
    """

    def __init__(
        self,
        trajectories: list[Trajectory],
        cancel: Callable[[Handle], None],
        request_estimate: Callable[[Handle], None],
        number: int = 0,
        about: object = None,
    ) -> None:
        self.number = number
        self.about = about
        self.trajectories = trajectories  # one an image
        self.done: Future[None] = Future()
        self.submitted = time.monotonic()
        self.calls: dict[Stage, Calls] = {}  # in the order of their first; set by the engine
        self.expected = 0.0  # when all will be done, as the engine last estimated
        self.estimated = 0.0  # when it did; 0: not yet
        self._cancel = cancel
        self._request_estimate = request_estimate
        self._listeners: list[Callable[[EngineEvent], None]] = []

    @property
    def started(self) -> float | None:
        """When the first call for this request began."""
        return next((calls.began for calls in self.calls.values()), None)

    def calls_so_far(self) -> dict[Stage, Calls]:
        """A copy that the engine does not change any more. From any thread, any time."""
        return {stage: replace(calls) for stage, calls in self.calls.copy().items()}

    @property
    def images(self) -> list[Image.Image]:
        """Those of a request that is done, in order."""
        return [image_of(trajectory) for trajectory in self.trajectories]

    @property
    def has_listeners(self) -> bool:
        return bool(self._listeners)

    def cancel(self) -> None:
        """Stop between two steps; the result becomes Cancelled. From any thread, any time."""
        self._cancel(self)

    def preview_every(self, num_steps: int) -> None:
        """Make previews of the first image every so many steps, from now on; 0: none. From any
        thread, any time."""
        self.trajectories[0].preview_every = num_steps

    async def wait(self) -> None:
        """Return when every image is there; raise what went wrong. Cancelling this cancels it."""
        done = asyncio.wrap_future(self.done)
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            self.cancel()
            done.add_done_callback(lambda future: future.cancelled() or future.exception())
            raise

    async def events(self) -> AsyncGenerator[EngineEvent, None]:
        """Events until the request ends; then raises what went wrong, if anything did.

        Closing the generator cancels the request: a lost listener means a lost client.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting()

        def publish(event: EngineEvent | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(waiting.put, event)

        self.listen(publish)
        self.done.add_done_callback(lambda _: publish(None))
        try:
            while (event := await waiting.get()) is not None:
                yield event
            await self.wait()
        finally:
            self._listeners.remove(publish)
            self.cancel()  # nothing happens when it is done

    def listen(self, listener: Callable[[EngineEvent], None]) -> None:
        """Call `listener` with each event from now on, beginning with an estimate. It is called on
        the engine's thread, so it must be quick."""
        self._listeners.append(listener)
        self._request_estimate(self)

    def emit(self, event: EngineEvent) -> None:
        for listener in list(self._listeners):
            listener(event)


class _Waiting:
    """Events that wait for a listener, None at last, for one event loop.

    A listener that is slow, as when its client is, gets all of them, but of the previews among them
    only the newest: they would fill the memory.
    """

    def __init__(self) -> None:
        self._events: deque[list[EngineEvent | None]] = deque()  # each in a place of its own
        # Those of them with a preview, the places and what came into them.
        self._previews: deque[tuple[list[EngineEvent | None], Stepped]] = deque()
        self._arrived = asyncio.Event()

    def put(self, event: EngineEvent | None) -> None:
        place: list[EngineEvent | None] = [event]
        self._events.append(place)
        if isinstance(event, Stepped) and event.preview is not None:
            self._previews.append((place, event))
        if len(self._previews) > MAX_PREVIEWS:
            oldest, stepped = self._previews.popleft()
            oldest[0] = replace(stepped, preview=None)
        self._arrived.set()

    async def get(self) -> EngineEvent | None:
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        place = self._events.popleft()
        if self._previews and self._previews[0][0] is place:
            self._previews.popleft()
        return place[0]
