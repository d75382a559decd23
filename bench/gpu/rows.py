"""Rows of figures: printed as soon as they are known, appended to a file that outlives a crash.

A file of JSON lines may hold several runs. `latest` merges them: of rows with equal section and
labels the last one counts. Knows nothing of torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

Label = str | int | float
Labels = Mapping[str, Label]


class Kind(StrEnum):
    HEADER = "header"  # what the machine is
    FIGURES = "figures"
    NOTE = "note"  # what was not measured, and why
    FAILURE = "failure"  # what went wrong
    DONE = "done"  # a section has ended by itself


@dataclass(frozen=True)
class Row:
    """`labels` say what was measured, `figures` what came of it; units are in the names."""

    run: str  # when the run began
    section: str
    kind: Kind
    labels: Labels = field(default_factory=dict)
    figures: Labels = field(default_factory=dict)
    text: str = ""

    def __str__(self) -> str:
        parts = [" ".join(f"{name}={value}" for name, value in self.labels.items())]
        if self.kind is not Kind.FAILURE:  # where it happened is for readers of the file
            parts.append(", ".join(f"{name} {value}" for name, value in self.figures.items()))
        parts.append(self.text)
        said = ": ".join(part for part in parts if part)
        word = "" if self.kind is Kind.FIGURES else f"{self.kind} "
        return f"[{self.section}] {word}{said}"


class Log:
    """Where rows go. Several processes may append to one file."""

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.run = run

    def add(
        self,
        section: str,
        kind: Kind,
        labels: Labels | None = None,
        figures: Labels | None = None,
        text: str = "",
    ) -> None:
        """Print a row and make sure that it is on the disk."""
        row = Row(self.run, section, kind, labels or {}, _rounded(figures or {}), text)
        print(row, flush=True)
        with self.path.open("ab+") as file:
            if _is_cut_off(file):  # by a process that was killed while it wrote
                file.write(b"\n")
            file.write(json.dumps(asdict(row)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _is_cut_off(file: BinaryIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _rounded(figures: Labels) -> dict[str, Label]:
    """Four digits say more than any of these measurements can."""
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in figures.items()
    }


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows of these files. A line that was cut off, by a process that was killed, is left
    out."""
    return [row for path in sorted(paths) for row in _rows(path.read_text(encoding="utf-8"))]


def _rows(text: str) -> Iterator[Row]:
    for line in text.splitlines():
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield Row(**{**fields, "kind": Kind(fields["kind"])})


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last of the rows with the same labels, in the order in which each was first seen.

    Failures of a section are dropped when a later run of it has ended well.
    """
    found: dict[tuple[str, str, tuple[tuple[str, Label], ...]], Row] = {}
    for row in rows:
        if row.kind is Kind.DONE:
            for key in [k for k, old in found.items() if _is_made_good(old, row)]:
                del found[key]
        topic = "figures" if row.kind in (Kind.FIGURES, Kind.HEADER) else row.kind
        found[row.section, topic, tuple(row.labels.items())] = row
    return list(found.values())


def _is_made_good(old: Row, done: Row) -> bool:
    unmeasured = old.kind in (Kind.NOTE, Kind.FAILURE)
    return unmeasured and old.section == done.section and old.run != done.run
