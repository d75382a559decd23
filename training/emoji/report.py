"""Writes the figures of the last run into README.md: `python -m training.emoji.report FOLDER`.

FOLDER is what scripts/emoji-gpu has brought back, or out/ of a run here. Its score.json is copied
to results.json, and its grids of pictures into docs/images.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT, SCORES = HERE / "README.md", HERE / "results.json"
IMAGES = HERE.parents[1] / "docs" / "images"
BEGIN, END = "<!-- figures:begin -->\n", "<!-- figures:end -->"
COPIED = {
    "score.json": SCORES,
    "samples.png": IMAGES / "emoji-prompts.png",
    "autoencoder.png": IMAGES / "emoji-autoencoder.png",
}
COLUMNS = ("pictures", "group", "count", "top 1", "top 5", "background")
NOT_RUN = "Not measured: the model has not been trained yet.\n"


def figures() -> str:
    """A table of the scores and the two grids, in Markdown."""
    if not SCORES.exists():
        return NOT_RUN
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for row in json.loads(SCORES.read_text(encoding="utf-8")):
        cells = [f"{row[c]:.1%}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    pictures = (
        "\nThe prompts of `GRID` in `score.py`, row by row:\n\n"
        "![pictures of 24 prompts](../../docs/images/emoji-prompts.png)\n\n"
        "Real pictures, and below them what the autoencoder makes of them:\n\n"
        "![icons and their reconstructions](../../docs/images/emoji-autoencoder.png)\n"
    )
    return "\n".join(lines) + "\n" + pictures


def written(text: str) -> str:
    """The document with the figures of the last run."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + figures() + END + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="what a run has brought back")
    options = parser.parse_args()
    if options.folder:
        for name, target in COPIED.items():
            shutil.copy(options.folder / name, target)
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(written(text), encoding="utf-8")


if __name__ == "__main__":
    main()
