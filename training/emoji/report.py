"""Writes the figures of the last run into README.md: `python -m training.emoji.report FOLDER`.

FOLDER is what scripts/emoji-gpu has brought back. Its score.json, samples.png and autoencoder.png
are copied into training/emoji/results, from which the document is made.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT, RESULTS = HERE / "README.md", HERE / "results"
BEGIN, END = "<!-- figures:begin -->\n", "<!-- figures:end -->"
COPIED = ("score.json", "samples.png", "autoencoder.png")
COLUMNS = ("pictures", "group", "count", "top 1", "top 5", "background")
NOT_RUN = "Not measured: the model has not been trained yet.\n"


def figures(results: Path) -> str:
    """A table of the scores and the two grids, in Markdown."""
    if not (results / "score.json").exists():
        return NOT_RUN
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for row in json.loads((results / "score.json").read_text(encoding="utf-8")):
        cells = [f"{row[c]:.1%}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    pictures = (
        "\nThe prompts of `GRID` in `score.py`, row by row:\n\n"
        f"![pictures of 24 prompts]({results.name}/samples.png)\n\n"
        "Real pictures, and below them what the autoencoder makes of them:\n\n"
        f"![icons and their reconstructions]({results.name}/autoencoder.png)\n"
    )
    return "\n".join(lines) + "\n" + pictures


def written(text: str, results: Path) -> str:
    """The document with the figures of `results`."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + figures(results) + END + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="what a run has brought back")
    options = parser.parse_args()
    if options.folder:
        RESULTS.mkdir(exist_ok=True)
        for name in COPIED:
            shutil.copy(options.folder / name, RESULTS / name)
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(written(text, RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
