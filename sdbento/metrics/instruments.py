"""Counters, gauges and histograms whose labels are bounded, quick enough for the engine's loop.

All values are plain numbers of this process, and `copy` hands them out, so that a process that
computes can send them to the one that is scraped, which adds them up (`exposition`).
prometheus_client has no way to do so but files that several processes map, and a full disk kills
whoever writes to one.

Every method may be called from any thread; no lock is held for longer than a few assignments.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import product
from threading import Lock

OTHER = "other"  # the value of a label that has no room for the one that was given

Values = dict[tuple[str, ...], list[float]]  # by the values of the labels


class Label:
    """A label and its values: those that are known beforehand, and `room` for others."""

    def __init__(self, name: str, known: tuple[str, ...] = (), room: int = 0) -> None:
        self.name = name
        self.known = self.values = known
        self._most = len(known) + room
        self._lock = Lock()

    def expect(self, *values: str) -> None:
        """Know these values as well: they take none of the room."""
        with self._lock:
            new = tuple(value for value in values if value not in self.values)
            self.values += new
            self._most += len(new)

    def bounded(self, value: str) -> str:
        """`value`, or OTHER where there is no room for another one."""
        with self._lock:
            if value in self.values:
                return value
            if len(self.values) >= self._most:
                return OTHER
            self.values += (value,)
            return value


class Instrument:
    """What all kinds have in common. A series is a list: one number, or those of a histogram."""

    kind = ""

    def __init__(self, name: str, text: str, *labels: Label) -> None:
        self.name, self.text, self.labels = name, text, labels
        self._series: Values = {}
        self._lock = Lock()

    @property
    def zeros(self) -> list[float]:
        """A series that has counted nothing."""
        return [0.0]

    def copy(self) -> Values:
        """The series that have been written to."""
        with self._lock:
            return {labels: list(series) for labels, series in self._series.items()}

    def expected(self) -> Iterator[tuple[str, ...]]:
        """The values of the labels of every series that is shown, be it zero: a counter that
        appears with its first event has no rate until the second."""
        return product(*(label.values for label in self.labels))

    def _find(self, labels: tuple[str, ...]) -> list[float]:
        """The series of these labels. Under the lock."""
        if (series := self._series.get(labels)) is None:
            pairs = zip(self.labels, labels, strict=True)
            bounded = tuple(label.bounded(value) for label, value in pairs)
            series = self._series.setdefault(bounded, self.zeros)
        return series


class Counter(Instrument):
    """Counts what has happened."""

    kind = "counter"

    def add(self, *labels: str, amount: float = 1.0) -> None:
        with self._lock:
            self._find(labels)[0] += amount


class Gauge(Instrument):
    """Says how much there is at present."""

    kind = "gauge"

    def __init__(self, name: str, text: str, *labels: Label) -> None:
        super().__init__(name, text, *labels)
        self._followed: dict[tuple[str, ...], Callable[[], float]] = {}

    def set(self, value: float, *labels: str) -> None:
        with self._lock:
            self._find(labels)[0] = value

    def follow(self, read: Callable[[], float], *labels: str) -> None:
        """Ask `read`, which must be quick, whenever somebody looks."""
        with self._lock:
            self._followed[labels] = read

    def copy(self) -> Values:
        for labels, read in list(self._followed.items()):
            self.set(read(), *labels)
        return super().copy()


class Histogram(Instrument):
    """Counts how large something was: how often it was at most each of `bounds`.

    A series has the number in each bucket, of which the last is for whatever is above all bounds,
    and then the sum.
    """

    kind = "histogram"

    def __init__(self, name: str, text: str, *labels: Label, bounds: tuple[float, ...]) -> None:
        super().__init__(name, text, *labels)
        self.bounds = bounds

    @property
    def zeros(self) -> list[float]:
        return [0.0] * (len(self.bounds) + 2)

    def expected(self) -> Iterator[tuple[str, ...]]:
        """With labels none: a histogram has many series."""
        return super().expected() if not self.labels else iter(())

    def observe(self, value: float, *labels: str) -> None:
        bucket = bisect_left(self.bounds, value)
        with self._lock:
            series = self._find(labels)
            series[bucket] += 1.0
            series[-1] += value
