"""An engine process as the process that serves sees it: started, asked, watched, killed."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sdbento.backend.pool.channel import Channel
from sdbento.backend.pool.devices import EngineDevice
from sdbento.backend.pool.messages import Configure, Message, Report
from sdbento.environment import environment_on_gpu

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[3]
START = """
import sys; sys.path.insert(0, sys.argv[1])
from sdbento.process.heavy_imports import without_collector
with without_collector():
    from sdbento.backend.pool.engine_process import main
main(int(sys.argv[2]))
"""
END = 5.0  # seconds in which the kernel ends a process that was killed


class RemoteEngine:
    """One process. `on_message` and `on_end` are called on a thread of its own; `on_end` once, when
    the process is gone. `report`: its newest, None until it has started. `num_messages`: so many
    have come; `heard`: the last one then, by the monotonic clock, 0 before the first."""

    def __init__(
        self,
        device: EngineDevice,
        on_message: Callable[[RemoteEngine, Message], None],
        on_end: Callable[[RemoteEngine], None],
    ) -> None:
        self.device = device
        self.report: Report | None = None
        self.num_messages = 0
        self.heard = 0.0
        self._on_message = on_message
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(ROOT), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env=environment_on_gpu(device.gpu),
                pass_fds=[theirs.fileno()],
            )
        self._channel = Channel[Message](ours, f"sdbento-{device.name.replace(' ', '-')}")
        self._channel.start(self._receive, lambda: on_end(self))
        self.send(Configure(device.settings, device.name))

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Message) -> None:
        """Never blocks. Lost if the process ends before it reads it."""
        self._channel.send(message)

    def kill(self) -> None:
        """End it at once, and free all that it had. Blocks for a moment."""
        self._process.kill()
        try:
            self._process.wait(END)
        except subprocess.TimeoutExpired:  # its driver hangs in the kernel
            log.error("the engine process of %s cannot be ended", self.device.name)
        self._channel.close()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by itself within so many seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _receive(self, message: Message) -> None:
        self.num_messages, self.heard = self.num_messages + 1, time.monotonic()
        self._on_message(self, message)
