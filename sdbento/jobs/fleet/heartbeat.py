"""A thread that calls something every few seconds, whatever the rest of the process does.

The event loop may be busy for long, and a server that is silent for as long is taken for dead.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from sdbento.background import Problem
from sdbento.errors import classify, unexplained

log = logging.getLogger(__name__)

AGAIN = 1.0  # seconds after a beat that failed


class Heartbeat:
    """`start` it, and `stop` it, which waits for a beat that has begun."""

    def __init__(self, beat: Callable[[], object], seconds: float) -> None:
        self._beat = beat
        self._seconds = seconds
        self._stopping = threading.Event()
        self._problem = Problem(log)
        self._thread = threading.Thread(target=self._run, name="sdbento-heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        pause = self._seconds
        while not self._stopping.wait(pause):
            pause = self._seconds
            try:
                self._beat()
            except Exception as exc:
                pause = AGAIN
                reason = classify(exc).message
                self._problem.note(f"other servers cannot be told: {reason}", unexplained(exc))
            else:
                self._problem.solved()
