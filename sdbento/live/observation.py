"""Observes one engine for as long as somebody wants snapshots of its batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from sdbento.background import start_task
from sdbento.engine.loop import Engine
from sdbento.live.recorder import INTERVAL, Recorder
from sdbento.live.snapshot import Snapshot


class Observation:
    """`publish` is given each snapshot of `engine`, and `on_failure` is called if there will be no
    more, both on the event loop on which this is made, until `end`."""

    def __init__(
        self,
        engine: Engine,
        publish: Callable[[Snapshot], None],
        on_failure: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._publish = publish
        self._loop = asyncio.get_running_loop()
        self._recorder = engine.observer = Recorder(engine, self._hand_over)
        self._refreshing = start_task(self._refresh(), "sdbento live batch", on_failure)

    def end(self) -> None:
        self._refreshing.cancel()
        self._engine.observer = None

    def _hand_over(self, snapshot: Snapshot) -> None:
        """From the engine's thread to the event loop."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._take, snapshot)

    def _take(self, snapshot: Snapshot) -> None:
        if self._engine.observer is self._recorder:  # not one that is late, after `end`
            self._publish(snapshot)

    async def _refresh(self) -> None:
        """Have the snapshots made that no call causes: the first, the last before the engine goes
        idle, and one now and then while it is."""
        while self._engine.observer is self._recorder:
            refreshed = self._engine.call(self._recorder.refresh)
            while not refreshed.done() or not self._recorder.is_due:
                await asyncio.sleep(INTERVAL)
            refreshed.result()
        raise RuntimeError("the engine has dropped its observer, which failed")
