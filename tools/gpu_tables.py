"""Writes the measurements made on a GPU into docs/performance.md: `python -m tools.gpu_tables`.

They are the rows that `python -m bench.gpu` has written to bench/results/gpu, without the runs of
small networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.gpu.rows import Kind, Row, latest, read
from bench.gpu.tables import table
from tools.marked import replaced

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results" / "gpu"
NOT_RUN = "**Not run on a GPU.**"


def measured(folder: Path = RESULTS) -> str:
    """The tables, or a sentence that says there are none."""
    rows = _at_full_size(read(folder.glob("*.jsonl")))
    return table(latest(rows)) if rows else NOT_RUN


def _at_full_size(rows: Sequence[Row]) -> list[Row]:
    headers = [row for row in rows if row.section == "run" and row.kind is Kind.HEADER]
    runs = {row.run for row in headers if row.figures["toy"] == "False"}
    return [row for row in rows if row.run in runs]


def written(text: str, folder: Path = RESULTS) -> str:
    """The document with the present tables between the markers."""
    return replaced(text, "gpu", measured(folder))


if __name__ == "__main__":
    REPORT.write_text(written(REPORT.read_text(encoding="utf-8")), encoding="utf-8")
