"""What the server's worker holds, looked at every ten seconds, and whether it grows."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import httpx
import numpy as np
import psutil

EVERY = 10.0  # seconds
WARM_UP = 0.25  # share of the time that is not judged: models load, caches fill
COLUMNS = ("rss_mb", "supervisor_mb", "descriptors", "threads", "connections", "metrics")


@dataclass(frozen=True)
class Sample:
    seconds: float  # since the start of the soak
    pid: int  # of the worker
    rss_mb: float
    supervisor_mb: float
    descriptors: int
    threads: int
    connections: int
    metrics: int  # series at /metrics
    queued: int
    phase: str  # load, pause (draining, not yet given back) or rest


@dataclass(frozen=True)
class Trend:
    """A straight line through the samples (least squares)."""

    first: float  # means of the first and the last tenth
    last: float
    least: float
    most: float
    slope_per_hour: float
    hours: float

    def told(self) -> dict[str, float]:
        """With what the line rises from its first sample to its last."""
        return asdict(self) | {"rise": self.slope_per_hour * self.hours}


def worker_of(supervisor: int) -> psutil.Process | None:
    """The server's process that computes: the largest child of BentoML's supervisor."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(supervisor).children(recursive=True)
        return max(children, key=lambda child: int(child.memory_info().rss), default=None)
    return None


class Sampler:
    def __init__(self, supervisor: Callable[[], int], http: httpx.Client, metrics_key: str) -> None:
        self.samples: list[Sample] = []
        self.phase = "load"
        self._supervisor, self._http = supervisor, http
        self._headers = {"Authorization": f"Bearer {metrics_key}"}
        self._start = time.monotonic()

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(EVERY):
            with suppress(psutil.Error, httpx.TransportError, OSError):
                if (sample := self.look()) is not None:
                    self.samples.append(sample)

    def look(self) -> Sample | None:
        pid = self._supervisor()
        if (worker := worker_of(pid)) is None:
            return None
        text = self._http.get("/metrics", headers=self._headers).text
        queued = re.search(r"^sdbento_queue_depth(?:{.*})? (\S+)", text, re.MULTILINE)
        with worker.oneshot():
            return Sample(
                seconds=round(time.monotonic() - self._start, 1),
                pid=worker.pid,
                rss_mb=worker.memory_info().rss / 1e6,
                supervisor_mb=psutil.Process(pid).memory_info().rss / 1e6,
                descriptors=worker.num_fds(),
                threads=worker.num_threads(),
                connections=len(worker.net_connections("tcp")),
                metrics=sum(not line.startswith("#") for line in text.splitlines()),
                queued=round(float(queued[1])) if queued else 0,
                phase=self.phase,
            )


def longest_lived(samples: Sequence[Sample]) -> list[Sample]:
    """Those of the worker that lived longest, without its warm-up."""
    by_pid: dict[int, list[Sample]] = {}
    for sample in samples:
        by_pid.setdefault(sample.pid, []).append(sample)
    longest = max(by_pid.values(), key=len, default=[])
    return longest[int(len(longest) * WARM_UP) :]


def trend(samples: Sequence[Sample], column: str) -> Trend:
    """Needs two samples or more."""
    hours = np.array([sample.seconds for sample in samples]) / 3600
    values = np.array([getattr(sample, column) for sample in samples], dtype=float)
    tenth = max(1, len(values) // 10)
    slope = float(np.polyfit(hours, values, 1)[0])
    return Trend(
        first=float(values[:tenth].mean()),
        last=float(values[-tenth:].mean()),
        least=float(values.min()),
        most=float(values.max()),
        slope_per_hour=slope,
        hours=float(hours[-1] - hours[0]),
    )


def trends(samples: Sequence[Sample]) -> dict[str, dict[str, dict[str, float]]]:
    """Under load and at rest apart: at rest the server gives freed memory back."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for phase in ("load", "rest"):
        chosen = [sample for sample in samples if sample.phase == phase]
        if len(chosen) >= 2:
            found[phase] = {name: trend(chosen, name).told() for name in COLUMNS}
    return found
