"""Ends this process when the one that started it has died, which nothing else would do.

When BentoML's supervisor is killed (`kill -9`, out of memory), the process that serves would live
on: a new server says "address already in use", and that another server keeps its jobs.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

from sdbento.process.deadline import end_within

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2  # between two looks at who the parent is
DRAIN_SECONDS = 10  # from SIGTERM to the end of a process that does not end by itself


def end_with_parent(parent: int, drain_seconds: int = DRAIN_SECONDS) -> None:
    """Once the process `parent` is no longer the parent of this one, send this one SIGTERM, and end
    it after `drain_seconds` in any case.

    parent: its id as the parent itself had it. It may have died before this is called.
    """
    # Linux could send the signal itself (PR_SET_PDEATHSIG), but does so when the *thread* ends that
    # started this process.
    watch = threading.Thread(
        target=_watch, args=(parent, drain_seconds), name="sdbento-parent", daemon=True
    )
    watch.start()


def _watch(parent: int, drain_seconds: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    log.warning("the process that started this one (%d) has died: stopping", parent)
    end_within(drain_seconds)
    os.kill(os.getpid(), signal.SIGTERM)
