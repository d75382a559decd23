"""What a plan costs: seconds of a UNet call by rows, of a decode by images; learned in service.

A curve t(rows) is kept per (model, latent size, stage): a running mean of measured times, straight
lines between measured row counts, and beyond them the hope that batching pays, so that larger
batches get tried. A size that was never run borrows the curve of the nearest size of its model,
scaled by the number of latent pixels. Knows nothing of torch.
"""

from __future__ import annotations

from bisect import bisect_left

from sdbento.trajectory import BatchKey, Stage

FIRST_GUESS = 0.05  # seconds a row at 64x64 latents, used only until the first measurement
FASTER, SLOWER = 0.5, 0.1  # weight of a new measurement: whatever disturbs a timing makes it longer
OUTLIER = 2.0  # a measurement this many times the mean counts as this many times the mean
HOPE = 0.7  # beyond the measured counts seconds are taken to grow as rows ** HOPE
WORTHWHILE = 1.02  # more rows must be this much cheaper a row to be worth the longer step


class Curve:
    """t(rows) for one kind of call."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def observe(self, rows: int, seconds: float) -> None:
        """Take in one measurement; a first one counts whole, later ones are smoothed in."""
        known = self._seconds.setdefault(rows, seconds)
        weight = FASTER if seconds < known else SLOWER
        self._seconds[rows] += weight * (min(seconds, OUTLIER * known) - known)

    def predict(self, rows: int) -> float | None:
        """Seconds for `rows` rows; None when nothing was measured yet."""
        known = sorted(self._seconds)
        if not known:
            return None
        at = bisect_left(known, rows)
        if at < len(known) and known[at] == rows:
            return self._seconds[rows]
        if at == 0:
            return self._seconds[known[0]]  # fewer rows never cost more
        low = known[at - 1]
        if at == len(known):
            return float(self._seconds[low] * (rows / low) ** HOPE)
        high = known[at]
        share = (rows - low) / (high - low)
        return self._seconds[low] + share * (self._seconds[high] - self._seconds[low])


class CostModel:
    """The curves of all kinds of calls. Owned by the planner, used on the engine's thread only."""

    def __init__(self) -> None:
        self._curves: dict[tuple[BatchKey, Stage], Curve] = {}
        self._knees: dict[tuple[BatchKey, int], int] = {}

    def observe(self, key: BatchKey, stage: Stage, rows: int, seconds: float) -> None:
        self._curves.setdefault((key, stage), Curve()).observe(rows, seconds)
        self._knees.clear()

    def measured(self, key: BatchKey) -> bool:
        """Whether steps of this very key were measured: anything else is a guess."""
        return (key, Stage.STEP) in self._curves

    def seconds(self, key: BatchKey, stage: Stage, rows: int) -> float:
        """Predicted seconds of one call; always positive."""
        own = self._curves.get((key, stage))
        if own is not None and (predicted := own.predict(rows)) is not None:
            return max(predicted, 1e-6)
        return max(self._borrowed(key, stage, rows), 1e-6)

    def knee(self, key: BatchKey, max_rows: int) -> int:
        """The row count past which more rows only make everybody slower.

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

    def _borrowed(self, key: BatchKey, stage: Stage, rows: int) -> float:
        siblings = [
            (abs(other.latent_pixels - key.latent_pixels), other, curve)
            for (other, kind), curve in self._curves.items()
            if kind == stage and other.model == key.model
        ]
        if not siblings:
            return FIRST_GUESS * rows * key.latent_pixels / 64**2
        _, nearest, curve = min(siblings, key=lambda sibling: sibling[0])
        predicted = curve.predict(rows)
        assert predicted is not None  # a curve is made by its first measurement
        return predicted * key.latent_pixels / nearest.latent_pixels
