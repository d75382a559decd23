"""Ends a process that must be replaced, once its clients have been told.

Another one is started by whoever has started this one: BentoML's supervisor, or what runs the
container, which ends together with its only worker.
"""

from __future__ import annotations

import logging
import os
import signal
import threading

from sdbento.process.deadline import end_within

log = logging.getLogger(__name__)

LINGER = 5.0  # seconds in which health checks and new requests are still answered, with 503
LIMIT = 20  # seconds until the end of a process in which something hangs


def end_process(can_finish: bool) -> None:
    """Let this process end in LINGER seconds, as by SIGTERM. From any thread; returns at once.

    can_finish: whether requests under way can be finished, which the process then waits for. If
    not, something in it may hang for ever, so that it could not end by itself.
    """
    if not can_finish:
        end_within(LIMIT)
    log.warning("this process ends in %.0f seconds", LINGER)
    timer = threading.Timer(LINGER, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
