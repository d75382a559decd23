"""Tells the application that the process is asked to stop, before the server acts on it.

uvicorn finishes all open requests first and only then tells the application. A request that waits
for something the application would cut short when it stops (a long poll such as /runsync) would
keep the process from stopping for as long as it waits: the log says "Waiting for connections to
close", and `kill` seems to do nothing.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def on_termination(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` on the running event loop at SIGTERM or SIGINT, before the other handlers.

    Does nothing off the main thread, the only one that can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    others = {number: signal.getsignal(number) for number in SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(callback)
        other = others[signal.Signals(number)]
        if callable(other):
            other(number, frame)

    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, other in others.items():
            signal.signal(number, other)
