"""Draws the image sheets of docs/shapes.md: typed prompts, every colour and shape, effects."""

import argparse
from pathlib import Path

from diffusers import StableDiffusionPipeline
from PIL import Image

from draw import COLOURS, SHAPES, Scene
from score import PIPELINE, load_pipeline, paint_prompts, save_grid
from score_effects import add_controlnet, add_lora, control_image

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
STYLED = (
    "a large red circle",
    "a large blue square on a yellow background",
    "a large green triangle",
    "a large yellow star on a blue background",
    "a large white ring on a purple background",
    "a large orange cross on a black background",
)
CONTROLLED = (
    "a red shape",
    "a blue shape on a yellow background",
    "a green shape on a white background",
    "a purple shape",
    "a white shape on a black background",
    "an orange shape on a blue background",
)
DRAWN = (
    Scene("star", "black", "white", "large", 0.42, 0.55, 0.34),
    Scene("ring", "black", "white", "large", 0.58, 0.45, 0.36),
    Scene("cross", "black", "white", "small", 0.62, 0.38, 0.20),
    Scene("triangle", "black", "white", "large", 0.55, 0.50, 0.36),
    Scene("circle", "black", "white", "small", 0.38, 0.62, 0.20),
    Scene("square", "black", "white", "large", 0.45, 0.55, 0.36),
)


def vocabulary() -> list[str]:
    """Every colour of every shape, on the default background."""
    return [f"a large {colour} {shape}" for shape in SHAPES for colour in COLOURS]


def effects(pipeline: StableDiffusionPipeline) -> list[Image.Image]:
    """Rows of six: plain, outline, checker; then edges, and what the ControlNet makes of them."""
    rows = paint_prompts(pipeline, STYLED, steps=20, guidance=4.0)
    for style in ("outline", "checker"):
        add_lora(pipeline, style)
        rows += paint_prompts(pipeline, STYLED, steps=20, guidance=4.0)
        pipeline.unload_lora_weights()
    controls = [control_image(scene) for scene in DRAWN]
    controlled = add_controlnet(pipeline)
    return rows + controls + paint_prompts(controlled, CONTROLLED, 20, 4.0, controls)


def main() -> None:
    """Writes the sheets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=PIPELINE)
    parser.add_argument("--images", type=Path, default=IMAGES)
    options = parser.parse_args()
    options.images.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(options.model, "ddim")
    for name, captions, columns in (("prompts", TYPED, 6), ("vocabulary", vocabulary(), 8)):
        images = paint_prompts(pipeline, captions, steps=20, guidance=4.0)
        save_grid(images, columns, options.images / f"shapes-{name}.png")
    save_grid(effects(pipeline), 6, options.images / "shapes-effects.png")


if __name__ == "__main__":
    main()
