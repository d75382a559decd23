"""What calls cost: seconds of a UNet call by rows, of a decode by images, read from a file.

    {"name": "...", "origin": "measured by ...", "padded": false, "prepare": 0.004,
     "sides": {"128": {"unet": {"1": 0.0276, "16": 0.1376}, "decode": {"1": 0.044}}}}

Between the counts that a file lists the cost is a straight line, or with `padded` that of the next
one, as with CUDA graphs, which exist for some row counts only. Beyond the last it grows with the
count. A side that is not listed costs what the nearest one does, by its pixels.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Side:
    """Seconds of one call at one image side: by rows of the UNet, by images of a decode."""

    unet: dict[int, float]
    decode: dict[int, float]


@dataclass(frozen=True)
class Curves:
    """All costs of one device and one model; `origin` says where they come from."""

    name: str
    origin: str
    sides: dict[int, Side]
    prepare: float = 0.0  # seconds an image: prompts, first noise
    padded: bool = False

    @property
    def side(self) -> int:
        """The model's own."""
        return min(self.sides)

    def step(self, side: int, rows: int) -> float:
        nearest = self._nearest(side)
        return self._at(self.sides[nearest].unet, rows) * (side / nearest) ** 2

    def decode(self, side: int, images: int) -> float:
        nearest = self._nearest(side)
        return self._at(self.sides[nearest].decode, images) * (side / nearest) ** 2

    def best_row(self, side: int, most: int) -> float:
        """The least seconds a row that any call of up to `most` rows has."""
        return min(self.step(side, rows) / rows for rows in range(1, most + 1))

    def _nearest(self, side: int) -> int:
        return min(self.sides, key=lambda known: (abs(known - side), known))

    def _at(self, known: dict[int, float], count: int) -> float:
        counts = sorted(known)
        at = bisect_left(counts, count)
        if at == len(counts):
            return known[counts[-1]] * count / counts[-1]
        high = counts[at]
        if at == 0 or self.padded:
            return known[high]
        low = counts[at - 1]
        return known[low] + (known[high] - known[low]) * (count - low) / (high - low)


def read(path: Path) -> Curves:
    """Raises ValueError for a file that holds no curves."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        sides = {
            int(side): Side(_by_count(costs["unet"]), _by_count(costs["decode"]))
            for side, costs in fields.pop("sides").items()
        }
        return Curves(sides=sides, **fields)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} has no curves: {error!r}") from error


def write(curves: Curves, path: Path) -> None:
    path.write_text(json.dumps(asdict(curves), indent=1) + "\n", encoding="utf-8")


def _by_count(costs: dict[str, float]) -> dict[int, float]:
    return {int(count): seconds for count, seconds in costs.items()}
