"""Draws the picture sheets of docs/shapes.md: every colour of every shape, and typed prompts."""

import argparse
from pathlib import Path

from draw import COLOURS, SHAPES
from score import PIPELINE, load_pipeline, paint_prompts, save_grid

IMAGES = Path(__file__).parents[2] / "docs" / "images"
TYPED = (
    "a large red circle on a blue background",
    "a small yellow star on a black background",
    "a large green triangle on a white background",
    "a white ring on a purple background",
    "an orange cross on a green background",
    "a large black square on a yellow background",
    "a red circle",
    "small purple star",
    "tiny white square",
    "a picture of a big blue ring",
    "orange triangle, black background",
    "Green Cross on red",
)


def vocabulary() -> list[str]:
    """Every colour of every shape, on the default background."""
    return [f"a large {colour} {shape}" for shape in SHAPES for colour in COLOURS]


def main() -> None:
    """Writes the two sheets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=PIPELINE)
    parser.add_argument("--images", type=Path, default=IMAGES)
    options = parser.parse_args()
    options.images.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(options.model, "ddim")
    for name, captions, columns in (("prompts", TYPED, 6), ("vocabulary", vocabulary(), 8)):
        pictures = paint_prompts(pipeline, captions, steps=20, guidance=4.0)
        save_grid(pictures, columns, options.images / f"shapes-{name}.png")


if __name__ == "__main__":
    main()
