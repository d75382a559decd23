"""Writes the figures of the last run into README.md: `python -m training.emoji.report FOLDER`.

FOLDER is what scripts/emoji-gpu has brought back, or out/ of a run here. Its score.json is copied
to results.json, and its grids of pictures into docs/images. So are the figures of LoRAs and
ControlNet, if it has any.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT, SCORES, EFFECTS = (HERE / name for name in ("README.md", "results.json", "effects.json"))
IMAGES = HERE.parents[1] / "docs" / "images"
COPIED = {
    "score.json": SCORES,
    "samples.png": IMAGES / "emoji-prompts.png",
    "autoencoder.png": IMAGES / "emoji-autoencoder.png",
    "effects.json": EFFECTS,
    "effects.png": IMAGES / "emoji-effects.png",
}
COLUMNS = ("pictures", "group", "count", "top 1", "top 5", "background")
OF_LORAS = ("addition", "weight", "on blocks", "two colours")
OF_CONTROLNET = ("addition", "weight", "captions", "edges")
NOT_RUN = "Not measured yet.\n"

Row = dict[str, str | float]


def figures() -> str:
    """A table of the scores and the two grids, in Markdown."""
    if not SCORES.exists():
        return NOT_RUN
    pictures = (
        "\nThe prompts of `GRID` in `score.py`, row by row:\n\n"
        "![pictures of 24 prompts](../../docs/images/emoji-prompts.png)\n\n"
        "Real pictures, and below them what the autoencoder makes of them:\n\n"
        "![icons and their reconstructions](../../docs/images/emoji-autoencoder.png)\n"
    )
    return table(COLUMNS, read(SCORES)) + pictures


def effects() -> str:
    """Two tables and a grid of what LoRAs and ControlNet do."""
    if not EFFECTS.exists():
        return NOT_RUN
    rows = read(EFFECTS)
    tables = [table(c, [row for row in rows if c[-1] in row]) for c in (OF_LORAS, OF_CONTROLNET)]
    return "\n".join(tables) + "\n![rows of pictures](../../docs/images/emoji-effects.png)\n"


def read(path: Path) -> list[Row]:
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def table(columns: Sequence[str], rows: Iterable[Row]) -> str:
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for row in rows:
        cells = [f"{row[c]:.1%}" if isinstance(row[c], float) else str(row[c]) for c in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """The document with the figures of the last run."""
    for part, made in (("figures", figures()), ("effects", effects())):
        begin, end = (f"<!-- {part}:{word} -->\n" for word in ("begin", "end"))
        before, _, rest = text.partition(begin)
        text = before + begin + made + end + rest.partition(end)[2]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="what a run has brought back")
    options = parser.parse_args()
    if options.folder:
        for name, target in COPIED.items():
            if (options.folder / name).exists():
                shutil.copy(options.folder / name, target)
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(written(text), encoding="utf-8")


if __name__ == "__main__":
    main()
