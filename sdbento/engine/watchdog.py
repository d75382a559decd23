"""Notices when the engine's thread hangs in a call, or has died.

A call to a device that does not answer cannot be interrupted, and no other call could use the
device: all that can be done is to tell whoever can replace the process. Time in which the process
does not run (SIGSTOP, a laptop that sleeps) does not count: the watchdog counts its own ticks, and
is stopped together with the thread that it watches. Knows nothing of what the calls do.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

log = logging.getLogger(__name__)

TICK = 0.5  # seconds between two looks


@dataclass(frozen=True, eq=False)
class _Call:
    """What the watched thread is in, and the seconds after which it hangs there."""

    what: str
    limit: float


class Watchdog:
    """Watches one thread. `on_failure` is told, once, what is wrong with it."""

    def __init__(self, thread: threading.Thread, on_failure: Callable[[str], None]) -> None:
        self._thread = thread
        self._on_failure = on_failure
        self._call: _Call | None = None
        self._seen: _Call | None = None  # at the last look
        self._ticks = 0  # for which it has been the same call
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to watch the thread, which must have been started."""
        threading.Thread(target=self._run, name="sdbento-watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    @contextmanager
    def watching(self, what: str, limit: float) -> Iterator[None]:
        """The watched thread is in a call that hangs if it takes longer than `limit` seconds; one
        within another begins the other's seconds anew."""
        before, self._call = self._call, _Call(what, limit)
        try:
            yield
        finally:
            self._call = None if before is None else replace(before)

    def _run(self) -> None:
        while not self._stopped.wait(TICK):
            if (failure := self.look()) is not None:
                self._on_failure(failure)
                return

    def look(self) -> str | None:
        """What is wrong with the thread, a tick after the last look; None if nothing is."""
        if not self._thread.is_alive():
            return f"the thread {self._thread.name} has died"
        call = self._call
        self._ticks = self._ticks + 1 if call is self._seen else 0
        self._seen = call
        if call is None or self._ticks * TICK <= call.limit:
            return None
        self._log_stack()
        return f"{call.what} hangs: it is not done after {call.limit:.0f} s"

    def _log_stack(self) -> None:
        """Where it hangs, for whoever looks for the reason."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        if frame is not None:
            stack = "".join(traceback.format_stack(frame))
            said, name = "the thread %s hangs here:", self._thread.name
            # Not in the message: a message is one line of the log.
            record = log.makeRecord(
                log.name, logging.ERROR, __file__, 0, said, (name,), None, sinfo=stack.rstrip()
            )
            log.handle(record)
