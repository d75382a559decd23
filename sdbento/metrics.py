"""What /metrics shows in addition to BentoML's own metrics."""

from __future__ import annotations

from pathlib import Path

import psutil
from prometheus_client import Gauge

queue_depth = Gauge(
    "sdbento_queue_depth", "Requests that wait: unfinished ones beyond MAX_BATCH_SIZE"
)


def forget_dead_processes(folder: Path) -> None:
    """Delete what processes that have died left in `folder`, where prometheus_client lets each keep
    its numbers.

    Requests of a process that was killed would be in progress for ever, and the folder would grow
    with every restart. Counters begin anew, as they do with a new server.
    """
    for file in folder.glob("*_*.db"):
        pid = file.stem.rpartition("_")[2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            file.unlink(missing_ok=True)
