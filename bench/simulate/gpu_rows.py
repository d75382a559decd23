"""Cost curves from what `make bench-gpu` has measured: the engine's steps, and decodes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.gpu.rows import Kind, Row, latest, read
from bench.simulate.curves import Curves, Side

SIDES = {"sdxl": 1024, "sd15": 512}
ROWS_PER_IMAGE = 2  # all of them are guided there
PREDICTED_DECODE = {"sdxl": 0.0375, "sd15": 0.009}  # seconds, from published figures


def curves_of(folder: Path) -> dict[str, Curves]:
    """By name: one for each model and way to compute a step, all in CUDA graphs.

    Where decoding was not measured, its time is a prediction, and the curve says so.
    """
    rows = latest(read(folder.glob("*.jsonl")))
    machine = next((_machine(row) for row in rows if row.kind is Kind.HEADER), "a GPU")
    made = {}
    for (model, way), by_images in _steps(rows).items():
        if model not in SIDES:
            continue
        measured = _decode(rows, model)
        decode = PREDICTED_DECODE[model] if measured is None else measured
        side = Side({ROWS_PER_IMAGE * n: s for n, s in sorted(by_images.items())}, {1: decode})
        origin = f"measured by `make bench-gpu` on {machine}"
        origin += ", decoding predicted" if measured is None else ""
        name = re.sub(r"\W+", "-", f"{machine}-{model}-{way}".lower()).strip("-")
        title = f"{model}, {way}, {machine}"
        made[name] = Curves(title, origin, {SIDES[model]: side})
    return made


def _steps(rows: Iterable[Row]) -> dict[tuple[str, str], dict[int, float]]:
    """Seconds of a captured step by images, for each model and way to compute it."""
    steps: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        labels = row.labels
        if row.kind is Kind.FIGURES and labels.get("what") == "a step":
            way = str(labels.get("variant", labels.get("system")))
            if "graph" in way:
                seconds = round(float(row.figures["ms_per_step"]) / 1000, 6)
                steps[str(labels["model"]), way][int(labels["images"])] = seconds
    return steps


def _decode(rows: Sequence[Row], model: str) -> float | None:
    """Seconds of the fastest decode of one image."""
    found = [
        float(row.figures["ms_per_image"]) / 1000
        for row in rows
        if row.kind is Kind.FIGURES
        and row.labels.get("what") == "decode"
        and row.labels.get("model") == model
        and row.labels.get("images") == 1
    ]
    return min(found, default=None)


def _machine(row: Row) -> str:
    return str(row.figures.get("gpu", row.figures.get("device", "a GPU")))
