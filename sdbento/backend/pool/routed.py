"""A request that an engine process makes, kept until it is done: another may have to make it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sdbento.access.caller import Caller
from sdbento.backend.pool.routing import Need
from sdbento.engine.handle import Calls, Handle
from sdbento.engine.trajectory import Stage
from sdbento.errors import SDBentoError
from sdbento.request.resolved import ResolvedRequest
from sdbento.request.result import Begun

if TYPE_CHECKING:
    from PIL import Image

    from sdbento.backend.pool.slot import Slot

UNIT = 512 * 512  # pixels of a row of a step: the unit of `num_units`


class RemoteHandle(Handle):
    """A Handle for images that another process makes."""

    def __init__(
        self,
        number: int,
        cancel: Callable[[Handle], None],
        request_estimate: Callable[[Handle], None],
        preview: Callable[[int], None],
    ) -> None:
        super().__init__([], cancel, request_estimate, number)
        self._preview = preview
        self._made: list[Image.Image] = []

    @property
    def images(self) -> list[Image.Image]:
        return self._made

    def preview_every(self, num_steps: int) -> None:
        self._preview(num_steps)

    def finish(self, images: list[Image.Image], calls: dict[Stage, Calls]) -> None:
        """They are there. From here on nothing changes."""
        self._made, self.calls = images, calls
        self.done.set_result(None)


@dataclass(eq=False)
class RoutedRequest:
    """What the router keeps of a request until it is done, so that it can be made again.

    num_units: of work, as `units_of` counts it. placed: when an engine got it. loading: the keys
    that this engine had to load for it first. num_lost: how many engines died while they had it;
    lost: when the last one did.
    """

    request: ResolvedRequest
    caller: Caller
    handle: RemoteHandle
    needs: Sequence[Need]
    num_units: float
    begun: Future[Begun] = field(default_factory=Future)
    slot: Slot | None = None
    placed: float = 0.0
    loading: Sequence[str] = ()
    num_lost: int = 0
    lost: float = 0.0
    preview_every: int | None = None

    @property
    def number(self) -> int:
        return self.handle.number

    def __post_init__(self) -> None:
        self.begun.set_running_or_notify_cancel()  # who waits for it cannot cancel it

    def begin(self, own_sampler: str, warnings: tuple[str, ...], at: float) -> None:
        self.handle.submitted, self.handle.calls = at, {}
        if not self.begun.done():  # as it is when the request is made again
            self.begun.set_result(Begun(self.handle, own_sampler, warnings))

    def lose(self) -> None:
        """Its engine is gone."""
        self.slot, self.lost = None, time.monotonic()
        self.num_lost += 1

    def fail(self, error: SDBentoError) -> None:
        if not self.begun.done():
            self.begun.set_exception(error)
        if not self.handle.done.done():
            self.handle.done.set_exception(error)

    def place(self, slot: Slot, loading: Sequence[str]) -> None:
        self.slot, self.loading, self.placed = slot, loading, time.monotonic()


def units_of(request: ResolvedRequest) -> float:
    """About how much work it is, compared with others."""
    settled, (width, height) = request.settled, request.size
    rows = 1 if settled.guidance_scale <= 1 else 2
    steps = settled.num_inference_steps * (settled.strength or 1.0)
    return settled.num_images * rows * steps * width * height / UNIT
