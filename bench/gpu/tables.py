"""Rows to Markdown: a table for each kind of row of a section. Knows nothing of torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.gpu.rows import Kind, Row
from bench.gpu.sections import SECTIONS


def table(rows: Sequence[Row], failures: bool = True) -> str:
    """All sections in their order, with the machine as heading. `failures`: include failures."""
    parts = [_machine(row) for row in rows if row.kind is Kind.HEADER]
    for section in SECTIONS.values():
        own = [row for row in rows if row.section == section.name]
        body = [*_tables(own), *_remarks(own, failures)]
        if body:
            parts.append("\n\n".join([f"### {section.title}", *body]))
    return "\n\n".join(parts) or "nothing was measured"


def _machine(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.figures.items())


def _tables(rows: Iterable[Row]) -> list[str]:
    """One table for all rows with the same columns."""
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Row]] = {}
    for row in rows:
        if row.kind is Kind.FIGURES:
            groups.setdefault((tuple(row.labels), tuple(row.figures)), []).append(row)
    return [_one(list(columns), members) for (columns, _), members in groups.items()]


def _one(labels: list[str], rows: list[Row]) -> str:
    """One table; what all rows have in common stands above it."""
    common = [name for name in labels if len({row.labels[name] for row in rows}) == 1]
    if len(rows) == 1:
        common = [name for name in common if name == "what"]
    heads = [name for name in labels if name not in common]
    figures = list(rows[0].figures)
    lines = [", ".join(str(rows[0].labels[name]) for name in common), ""] if common else []
    lines.append(f"| {' | '.join(name.replace('_', ' ') for name in [*heads, *figures])} |")
    lines.append("| --- " * (len(heads) + len(figures)) + "|")
    for row in rows:
        cells = [row.labels[name] for name in heads] + [row.figures[name] for name in figures]
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _remarks(rows: Iterable[Row], failures: bool) -> list[str]:
    wanted = (Kind.NOTE, Kind.FAILURE) if failures else (Kind.NOTE,)
    lines = []
    for row in rows:
        if row.kind in wanted:
            about = ", ".join(str(value) for value in row.labels.values())
            word = "failed: " if row.kind is Kind.FAILURE else ""
            lines.append(f"- {about}{': ' if about else ''}{word}{row.text}")
    return ["\n".join(lines)] if lines else []
