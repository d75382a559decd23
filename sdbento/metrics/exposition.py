"""Shows Prometheus what was counted, by this process and by those that compute for it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from threading import Lock

from prometheus_client import REGISTRY
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from sdbento.metrics.definitions import METRICS
from sdbento.metrics.instruments import Gauge, Histogram, Instrument, Values

Snapshot = dict[str, Values]  # by the name of the metric


def snapshot() -> Snapshot:
    """What this process has counted so far, and how much it has at present."""
    return {name: values for name, one in METRICS.items() if (values := one.copy())}


class Exposition(Collector):
    """Adds up this process and the last snapshot of each other one. Thread-safe."""

    def __init__(self) -> None:
        self._others: dict[str, Snapshot] = {}
        self._ended: Snapshot = {}  # what processes had counted that are no more
        self._lock = Lock()

    def absorb(self, process: str, counted: Snapshot) -> None:
        """`process` has counted so much since it started; replaces what it said before."""
        with self._lock:
            self._others[process] = counted

    def end(self, process: str) -> None:
        """`process` is no more: what it had counted stays, what it had is gone."""
        with self._lock:
            last = self._others.pop(process, {})
            kept = {name: last[name] for name in last if not isinstance(METRICS[name], Gauge)}
            self._ended = _sum([self._ended, kept])

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            counted = _sum([snapshot(), *self._others.values(), self._ended])
        for name, instrument in METRICS.items():
            yield _family(instrument, counted.get(name, {}))


def _sum(snapshots: list[Snapshot]) -> Snapshot:
    total: Snapshot = {}
    for one in snapshots:
        for name, values in one.items():
            sums = total.setdefault(name, {})
            for labels, series in values.items():
                so_far = sums.get(labels, [0.0] * len(series))
                sums[labels] = [a + b for a, b in zip(so_far, series, strict=True)]
    return total


def _family(instrument: Instrument, counted: Values) -> Metric:
    zeros = instrument.zeros
    values = dict.fromkeys(instrument.expected(), zeros) | counted
    described = instrument.name, instrument.text
    names = [label.name for label in instrument.labels]
    if isinstance(instrument, Histogram):
        bounds = [*map(floatToGoString, instrument.bounds), "+Inf"]
        histogram = HistogramMetricFamily(*described, labels=names)
        for labels, (*counts, total) in values.items():
            histogram.add_metric(labels, [*zip(bounds, accumulate(counts), strict=True)], total)
        return histogram
    kind = GaugeMetricFamily if isinstance(instrument, Gauge) else CounterMetricFamily
    family = kind(*described, labels=names)
    for labels, (value,) in values.items():
        family.add_metric(labels, value)
    return family


EXPOSITION = Exposition()  # of this process


def expose_metrics() -> None:
    """Let whoever shows prometheus_client's metrics show ours as well. Once in a process."""
    REGISTRY.register(EXPOSITION)
