"""What /metrics shows beside BentoML's own figures."""

from __future__ import annotations

from prometheus_client import Gauge

queue_depth = Gauge(
    "sdbento_queue_depth",
    "Unfinished requests beyond the MAX_BATCH_SIZE that may be under way",
    multiprocess_mode="livesum",  # BentoML collects over processes
)
