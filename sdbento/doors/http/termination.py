"""The end of the server process, heard before the server itself acts on it.

uvicorn finishes all requests before it tells the application of its end. A request that waits for
what the end would bring must hear of it earlier. Knows nothing of what is served.
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
def heard_before_the_server(listen: Callable[[], None]) -> Iterator[None]:
    """Call `listen` on the running event loop when the process is asked to end.

    What else handles the signals does so after it. Off the main thread no signals can be had.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    others = {number: signal.getsignal(number) for number in SIGNALS}

    def hear(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(listen)
        other = others[signal.Signals(number)]
        if callable(other):
            other(number, frame)

    for number in SIGNALS:
        signal.signal(number, hear)
    try:
        yield
    finally:
        for number, other in others.items():
            signal.signal(number, other)
