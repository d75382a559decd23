"""The place of one device in the pool: its engine process, the next one if that dies, its requests.

For the router's thread.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

from sdbento.backend.pool.devices import EngineDevice
from sdbento.backend.pool.messages import Report
from sdbento.backend.pool.remote import RemoteEngine
from sdbento.backend.pool.routed import RoutedRequest
from sdbento.backoff import Backoff

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before a process that died is started anew
STABLE = 60.0  # seconds after which a process that dies is no repeated failure
STARTING = 10.0  # seconds that a start takes, about
START_LIMIT = 300.0  # seconds after which it hangs


class Slot:
    """`engine` None: it is started again at `start_at`. `num_failures`: in a row."""

    def __init__(self, index: int, device: EngineDevice) -> None:
        self.index = index
        self.device = device
        self.engine: RemoteEngine | None = None
        self.requests: dict[int, RoutedRequest] = {}
        self.preloads: dict[int, Future[Any]] = {}
        self.num_failures = 0
        self.start_at = 0.0
        self._started = 0.0
        self._backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        self._num_messages = 0  # at the last look
        self._silent = 0.0  # seconds since then, by the looks

    @property
    def report(self) -> Report | None:
        return None if self.engine is None else self.engine.report

    @property
    def heard(self) -> float:
        """When its engine was heard last; 0: not yet; -1: there is none."""
        return -1.0 if self.engine is None else self.engine.heard

    @property
    def is_up(self) -> bool:
        return self.report is not None

    @property
    def is_alive(self) -> bool:
        """Up, or about to be for the first time."""
        return self.is_up or self.num_failures == 0

    @property
    def delay(self) -> float:
        """Seconds until it can begin with a request; long where it has often failed to start."""
        return 0.0 if self.is_up else STARTING * 2.0**self.num_failures

    def begin(self, engine: RemoteEngine) -> None:
        self.engine, self._started = engine, time.monotonic()
        self._num_messages, self._silent = 0, 0.0

    def fail(self) -> None:
        """Its engine is gone: another one is due after a pause."""
        now = time.monotonic()
        if self.is_up and now - self._started > STABLE:
            self.num_failures = 0
            self._backoff.reset()
        self.engine = None
        self.num_failures += 1
        self.start_at = now + self._backoff.next_pause()

    def hangs(self, seconds: float, limit: float) -> bool:
        """Whether its engine has been silent for longer than `limit`; look every `seconds`.

        Looks are counted, and no clock is read: while this process was stopped, nobody could hear.
        """
        engine = self.engine
        if engine is None:
            return False
        is_silent = engine.num_messages == self._num_messages
        self._silent = self._silent + seconds if is_silent else 0.0
        self._num_messages = engine.num_messages
        return self._silent > (limit if self.is_up else START_LIMIT)
