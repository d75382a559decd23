"""Those who watch the batch, for the router: snapshots of all engines, merged into one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from sdbento.backend.pool.messages import Observe
from sdbento.backend.pool.slot import Slot
from sdbento.live.merged import Merger
from sdbento.live.recorder import HEARTBEAT, INTERVAL
from sdbento.live.snapshot import Snapshot


class PoolObservation:
    """Made on the event loop on which `publish` and `on_failure` are called until `silence` is.
    Everything else is for the router's thread."""

    def __init__(
        self,
        slots: Sequence[Slot],
        publish: Callable[[Snapshot], None],
        on_failure: Callable[[], None],
    ) -> None:
        self._slots = slots
        self._publish = publish
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._is_silent = False
        self._merger = Merger()
        self._is_stale = False  # something is new since the last snapshot, which was published at
        # The first one waits for all engines, but not for longer than this.
        self._published = time.monotonic() + HEARTBEAT - INTERVAL

    def silence(self) -> None:
        """On the event loop: nothing is published from here on."""
        self._is_silent = True

    def begin(self) -> None:
        for slot in self._slots:
            self.begin_with(slot)

    def begin_with(self, slot: Slot) -> None:
        self._send(slot, Observe(wanted=True))

    def end(self) -> None:
        for slot in self._slots:
            self._send(slot, Observe(wanted=False))

    def take(self, slot: Slot, snapshot: Snapshot | None) -> None:
        """A snapshot of one engine; None: there will be no more."""
        if snapshot is None:
            self._call(self._on_failure)
            return
        self._merger.take(slot.index, snapshot)
        self._is_stale = True

    def drop(self, slot: Slot) -> None:
        self._merger.drop(slot.index)
        self._is_stale = True

    @property
    def seconds_left(self) -> float:
        """Until a snapshot is due."""
        if not self._is_stale:
            return INTERVAL
        if all(self._merger.has(slot.index) for slot in self._slots if slot.is_up):
            self._published = min(self._published, time.monotonic())
        return max(0.0, self._published + INTERVAL - time.monotonic())

    def publish_if_due(self) -> None:
        if not self._is_stale or self.seconds_left > 0:
            return
        self._is_stale, self._published = False, time.monotonic()
        if (merged := self._merger.merged()) is not None:
            self._call(lambda: self._publish(merged))

    def _send(self, slot: Slot, message: Observe) -> None:
        if slot.engine is not None and slot.is_up:
            slot.engine.send(message)

    def _call(self, function: Callable[[], None]) -> None:
        def call() -> None:
            if not self._is_silent:
                function()

        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call)
