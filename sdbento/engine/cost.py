"""What a plan costs: seconds of a UNet call by rows, of a decode by images; learned while serving.

A curve of seconds by rows is kept for each (model, latent size, stage). At row counts that were
timed it is the median of the last timings, and between them a straight line. Beyond them it assumes
that larger batches pay, so that they get tried. A size that has never run borrows the curve of the
nearest size of its model, scaled by the number of latent pixels.

The first call of a row count includes work that is done only once (cuDNN plans, page faults), so
its timing is discarded. No other can be trusted alone either, since the process may have been
stopped during the call: a row count is believed after ENOUGH timings, and once any is, the others
are ignored. Imports no torch.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from math import inf
from statistics import median_low

from sdbento.engine.trajectory import BatchKey, Stage

FIRST_GUESS = 0.05  # seconds for one row at 64x64 latents, until the first measurement
RECENT = 9  # the timings of a row count that are kept
ENOUGH = 3  # timings: the fewest whose median survives a wrong one
FRESH = 120.0  # seconds for which a timing can prove that a deadline cannot be met
GROWTH = 0.7  # beyond the timed row counts, seconds are assumed to grow as rows ** GROWTH
MAX_CURVES = 512  # kinds of calls whose timings are kept
WORTHWHILE = 1.02  # a longer step must make a row cheaper by this factor


class RecentTimings:
    """The last timings of one row count."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.latest = -inf  # when the last one was taken

    @property
    def enough(self) -> bool:
        return len(self.recent) >= ENOUGH


class Curve:
    """Seconds by rows, for one kind of call."""

    def __init__(self) -> None:
        self._timings: dict[int, RecentTimings] = {}
        self._seconds: dict[int, float] = {}  # by row count, in ascending order
        self.confirmed = False  # whether any row count was timed often enough

    def observe(self, rows: int, seconds: float, now: float = 0.0) -> bool:
        """Record the timing of one call that ended at `now`; whether the curve has changed."""
        before = self._seconds, self.confirmed
        timings = self._timings.setdefault(rows, RecentTimings())
        timings.recent.append(seconds)
        timings.latest = now
        self.confirmed |= timings.enough
        self._seconds = self._summary()
        return (self._seconds, self.confirmed) != before

    def predict(self, rows: int) -> float | None:
        """Seconds for `rows` rows; None when nothing was measured yet."""
        known = list(self._seconds)
        if not known:
            return None
        at = bisect_left(known, rows)
        if at < len(known) and known[at] == rows:
            return self._seconds[rows]
        if at == 0:
            return self._seconds[known[0]]  # fewer rows never cost more
        low = known[at - 1]
        if at == len(known):
            return float(self._seconds[low] * (rows / low) ** GROWTH)
        high = known[at]
        share = (rows - low) / (high - low)
        return self._seconds[low] + share * (self._seconds[high] - self._seconds[low])

    def lower_bound(self, rows: int, now: float) -> float:
        """Seconds that `rows` rows take at least: the best timing of as many rows or fewer.

        0 without enough timings, or where the last is not FRESH any more: requests that are refused
        because of a bad timing never run, and so never replace it.
        """
        evidence = (
            min(timings.recent)
            for count, timings in self._timings.items()
            if count <= rows and timings.enough and now - timings.latest <= FRESH
        )
        return max(evidence, default=0.0)

    def _summary(self) -> dict[int, float]:
        counts = [rows for rows, timings in self._timings.items() if timings.enough]
        seconds: dict[int, float] = {}
        least = inf
        for rows in sorted(counts or self._timings, reverse=True):
            least = min(least, median_low(self._timings[rows].recent))  # never above a larger count
            seconds[rows] = least
        return dict(reversed(seconds.items()))


class CostModel:
    """The curves of all kinds of calls. Owned by the planner; used on the engine's thread only.

    `computed_rows` tells how many rows a step of so many rows computes, where steps are padded.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        computed_rows: Callable[[int], int] | None = None,
    ) -> None:
        self._clock = clock
        self._computed_rows = computed_rows
        self._curves: dict[tuple[BatchKey, Stage], Curve] = {}
        self._called: dict[tuple[BatchKey, Stage], set[int]] = {}  # sizes, also the first of each
        # Caches of what the curves say, until one of them changes.
        self._sources: dict[tuple[BatchKey, Stage], BatchKey | None] = {}
        self._knees: dict[tuple[BatchKey, int], int] = {}

    def observe(self, key: BatchKey, stage: Stage, rows: int, seconds: float) -> None:
        """Record the seconds of a call that has just ended: `rows` rows, or images of a decode.

        The first of its kind and size is discarded.
        """
        size = self._computed(stage, rows)
        if self._is_first(key, stage, size):
            return
        curve = self._curves.setdefault((key, stage), Curve())
        if curve.observe(size, seconds, self._clock()):
            self._forget_conclusions()

    def _is_first(self, key: BatchKey, stage: Stage, size: int) -> bool:
        """Whether no such call was observed. The kind that was not called for longest is forgotten
        with its curve: requests may have sizes without end, and every conclusion looks at all."""
        sizes = self._called.pop((key, stage), set())
        self._called[key, stage] = sizes | {size}  # now the last
        if len(self._called) > MAX_CURVES:
            oldest = next(iter(self._called))
            del self._called[oldest]
            if self._curves.pop(oldest, None):
                self._forget_conclusions()
        return size not in sizes

    def _forget_conclusions(self) -> None:
        self._sources.clear()
        self._knees.clear()

    def seconds(self, key: BatchKey, stage: Stage, rows: int) -> float:
        """Predicted seconds of one call; always positive."""
        rows = self._computed(stage, rows)
        if (key, stage) not in self._sources:
            self._sources[key, stage] = self._source(key, stage)
        source = self._sources[key, stage]
        if source is None:
            return FIRST_GUESS * float(rows**GROWTH) * key.latent_pixels / 64**2
        predicted = self._curves[source, stage].predict(rows)
        assert predicted is not None  # a curve is made by its first timing
        return max(predicted * key.latent_pixels / source.latent_pixels, 1e-6)

    def is_timed(self, key: BatchKey, stage: Stage) -> bool:
        """Whether enough calls of this very key were timed to know what one takes."""
        own = self._curves.get((key, stage))
        return own is not None and own.confirmed

    def was_called(self, key: BatchKey, stage: Stage, rows: int) -> bool:
        """Whether a call of this very size has ended: the first of each may compile or capture."""
        return self._computed(stage, rows) in self._called.get((key, stage), ())

    def lower_bound(self, key: BatchKey, stage: Stage, rows: int) -> float:
        """Seconds that one call takes at least, by recent calls of this very key; 0 without any."""
        own = self._curves.get((key, stage))
        return 0.0 if own is None else own.lower_bound(self._computed(stage, rows), self._clock())

    def knee(self, key: BatchKey, max_rows: int) -> int:
        """The row count beyond which more rows only make everybody slower.

        The smallest count whose seconds a row are within WORTHWHILE of the best up to `max_rows`.
        """
        cached = self._knees.get((key, max_rows))
        if cached is None:
            per_row = [self.seconds(key, Stage.STEP, r) / r for r in range(1, max_rows + 1)]
            good = WORTHWHILE * min(per_row)
            cached = next(r for r, cost in enumerate(per_row, start=1) if cost <= good)
            self._knees[key, max_rows] = cached
        return cached

    def seconds_per_row(self, key: BatchKey, max_rows: int) -> float:
        """Cost of one row of a step in a full batch."""
        knee = self.knee(key, max_rows)
        return self.seconds(key, Stage.STEP, knee) / knee

    def _computed(self, stage: Stage, rows: int) -> int:
        if stage is Stage.STEP and self._computed_rows is not None:
            return self._computed_rows(rows)
        return rows

    def _source(self, key: BatchKey, stage: Stage) -> BatchKey | None:
        """Whose curve to use: the key's own, or the nearest size's while only that is confirmed.

        None where nothing of the model was measured. Shallow steps never tell what whole ones cost.
        """
        if self.is_timed(key, stage):
            return key
        candidates = [
            (not curve.confirmed, other != key, _distance(other, key), other)
            for (other, kind), curve in self._curves.items()
            if kind == stage and other.model == key.model and other.shallow <= key.shallow
        ]
        return min(candidates, key=lambda candidate: candidate[:3])[-1] if candidates else None


def _distance(one: BatchKey, other: BatchKey) -> tuple[bool, int]:
    """How badly the curve of one stands for that of the other."""
    return one.shallow != other.shallow, abs(one.latent_pixels - other.latent_pixels)
