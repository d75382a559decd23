"""Tells the application that the process is asked to stop, and bounds how long that takes.

uvicorn finishes all open requests first and only then tells the application. A request that waits
for something the application would cut short when it stops (a long poll such as /runsync) would
keep the process from stopping for as long as it waits: the log says "Waiting for connections to
close", and `kill` seems to do nothing. A long queue would do the same.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from types import FrameType
from typing import TYPE_CHECKING

from sdbento.process.deadline import end_within

if TYPE_CHECKING:
    from sdbento.app import App

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds for what remains when requests are no longer finished: answers, the job store. Whoever
# still sends or reads slowly is not waited for.
LIMIT = 8


@contextmanager
def on_termination(callback: Callable[[], None], limit: float | None = None) -> Iterator[None]:
    """Call `callback` on the running event loop at SIGTERM or SIGINT, before the other handlers;
    `limit` seconds later this process has ended, whatever hangs in it.

    Does nothing off the main thread, the only one that can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    others = {number: signal.getsignal(number) for number in SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        if limit is not None:  # here, since the loop may be busy by then
            end_within(ceil(limit))
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


def give_up_in_time(app: App) -> None:
    """From now on, finish requests for `shutdown_timeout` seconds; the others then get an error."""
    loop = asyncio.get_running_loop()
    loop.call_later(app.settings.shutdown_timeout, _give_up, app)


def _give_up(app: App) -> None:
    if app.num_requests:
        log.warning("stopping: %d requests were not finished in time", app.num_requests)
    app.give_up()
