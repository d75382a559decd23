"""What /metrics shows in addition to BentoML's own metrics."""

from __future__ import annotations

from prometheus_client import Gauge

queue_depth = Gauge(
    "sdbento_queue_depth", "Requests that wait: unfinished ones beyond MAX_BATCH_SIZE"
)
