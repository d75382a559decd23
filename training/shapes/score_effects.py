"""Scores the two LoRAs and the ControlNet of `shapes`, from pixels, with and without each.

Where the plain model's images score as high as those with the addition, it adds nothing.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from draw import CELL, SIDE, STROKE, Mask, Scene, coverage_of, paint
from export import PACKAGED
from judge import Pixels, border_colour, find_ink, fit_shape, nearest_colour, overlap_of
from score import Prompt, load_pipeline, paint_prompts, sample_prompts, save_grid
from train_controlnet import NAME as CANNY
from train_controlnet import edges_of, without_shape

MAX_DEEP = 0.1
"""Part of an outline's ink that may lie deeper than a stroke allows."""
MIN_ALTERNATION = 0.25
FOLLOWED = 0.8
"""Overlap from which an image's shape counts as the drawn one."""

Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class Sight:
    """What an image shows: two colours, and what the ink covers."""

    background: str | None
    colour: str | None
    ink: Mask


def look(image: Pixels) -> Sight:
    """Background, ink and coverage of an image, (128, 128, 3) in [0, 255]."""
    ground = border_colour(image)
    found = find_ink(image, ground)
    if found is None:
        return Sight(nearest_colour(ground), None, np.zeros((SIDE, SIDE), dtype=np.float32))
    colour, mask = found
    return Sight(nearest_colour(ground), nearest_colour(colour), mask)


def is_outline(ink: Mask) -> bool:
    """Whether the ink encloses something and is nowhere much thicker than a stroke."""
    bits = ink > 0.5
    if not bits.any() or (ndimage.binary_fill_holes(bits) == bits).all():
        return False
    depth = ndimage.distance_transform_edt(bits)[bits]
    return bool((depth > 0.75 * STROKE * SIDE).mean() <= MAX_DEEP)


def _agreement(ink: Mask, down: int, right: int) -> float:
    """The part of the ink that falls on ink again when moved by `down` and `right` pixels."""
    moved = np.roll(ink, (down, right), axis=(0, 1))
    return float((ink * moved).sum() / max(1.0, float(ink.sum())))


def is_checker(ink: Mask) -> bool:
    """Whether cells alternate: moved by one cell the ink misses itself, diagonally it does not."""
    cell = round(CELL * SIDE)
    straight = _agreement(ink, cell, 0) + _agreement(ink, 0, cell)
    diagonal = _agreement(ink, cell, cell) + _agreement(ink, cell, -cell)
    return (diagonal - straight) / 2 >= MIN_ALTERNATION


STYLE_TESTS = {"outline": is_outline, "checker": is_checker}


def silhouette(ink: Mask) -> Mask:
    """The ink with everything it encloses, gaps of a cell included."""
    radius = round(CELL * SIDE / 2)
    bits = np.pad(ink > 0.5, 2 * radius)
    rows, columns = np.indices((2 * radius + 1, 2 * radius + 1)) - radius
    closed = ndimage.binary_closing(bits, rows**2 + columns**2 <= radius**2)
    filled = ndimage.binary_fill_holes(closed)
    return np.asarray(filled[2 * radius : -2 * radius, 2 * radius : -2 * radius], dtype=np.float32)


def has_shape(ink: Mask, shape: str) -> bool:
    """Whether the silhouette is that of the shape; a ring's is a circle."""
    return fit_shape(silhouette(ink))[0] == shape.replace("ring", "circle")


def filled_part(ink: Mask) -> float:
    """The part of the silhouette that the ink covers."""
    return float(ink.sum() / max(1.0, float(silhouette(ink).sum())))


def style_rates(
    style: str, prompts: Sequence[Prompt], images: Sequence[Pixels]
) -> dict[str, float]:
    """The part of the images that show the style, and those that are otherwise as asked.

    `filled` is a mean, not a share of images: how much of the silhouettes the ink covers.
    """
    sights = [look(image) for image in images]
    pairs = list(zip(sights, (scene for scene, _ in prompts), strict=True))
    return {
        style: float(np.mean([STYLE_TESTS[style](sight.ink) for sight in sights])),
        "filled": float(np.mean([filled_part(sight.ink) for sight in sights])),
        "background": float(np.mean([s.background == scene.background for s, scene in pairs])),
        "colour": float(np.mean([s.colour == scene.colour for s, scene in pairs])),
        "shape": float(np.mean([has_shape(s.ink, scene.shape) for s, scene in pairs])),
    }


def control_rates(scenes: Sequence[Scene], images: Sequence[Pixels]) -> dict[str, float]:
    """How far the images' shapes cover the drawn ones, and whether the colours are as asked."""
    sights = [look(image) for image in images]
    pairs = list(zip(sights, scenes, strict=True))
    overlaps = [overlap_of(sight.ink, coverage_of(scene)) for sight, scene in pairs]
    return {
        "mean overlap": float(np.mean(overlaps)),
        "followed": float(np.mean([overlap >= FOLLOWED for overlap in overlaps])),
        "background": float(np.mean([s.background == scene.background for s, scene in pairs])),
        "colour": float(np.mean([s.colour == scene.colour for s, scene in pairs])),
    }


def report(title: str, rates: dict[str, float]) -> None:
    """Prints one line of the score table."""
    print(f"{title}: {', '.join(f'{k} {100 * v:.1f}%' for k, v in rates.items())}", flush=True)


def can_be_outlined(scene: Scene) -> bool:
    """Whether outline and filled shape differ: two strokes fill a small ring."""
    return (scene.shape, scene.size) != ("ring", "small")


def add_lora(pipeline: StableDiffusionPipeline, style: str, weight: float = 1.0) -> None:
    """Loads a packaged LoRA into the pipeline."""
    pipeline.load_lora_weights(PACKAGED.with_name(f"shapes-{style}"), adapter_name=style)
    pipeline.set_adapters(style, weight)


def add_controlnet(pipeline: StableDiffusionPipeline) -> StableDiffusionControlNetPipeline:
    """A pipeline of the same networks and the packaged ControlNet."""
    folder = PACKAGED.with_name(CANNY)
    controlnet = ControlNetModel.from_pretrained(folder, dtype=torch.float32)
    controlled = StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=controlnet, requires_safety_checker=False
    )
    controlled.set_progress_bar_config(disable=True)
    return controlled


def control_image(scene: Scene) -> Image.Image:
    """The canny edges of the scene's drawing, in three equal channels."""
    return Image.fromarray(edges_of(paint(scene))).convert("RGB")


def as_arrays(images: Sequence[Image.Image]) -> list[Pixels]:
    return [np.asarray(image, dtype=np.float32) for image in images]


def score_lora(
    pipeline: StableDiffusionPipeline, style: str, options: argparse.Namespace
) -> list[Image.Image]:
    """Reports a style's scores on true drawings and with three weights; returns the images."""
    prompts = [p for p in sample_prompts(2 * options.prompts) if can_be_outlined(p[0])]
    prompts = prompts[: options.prompts]
    captions = [caption for _, caption in prompts]
    drawings = [paint(scene, style=style) for scene, _ in prompts]
    report(f"{style}, true drawings", style_rates(style, prompts, drawings))
    shown: list[Image.Image] = []
    for weight in (0.0, 0.5, 1.0):
        add_lora(pipeline, style, weight)
        images = paint_prompts(pipeline, captions, options.steps, options.guidance)
        pipeline.unload_lora_weights()
        report(f"{style}, weight {weight}", style_rates(style, prompts, as_arrays(images)))
        shown += images
    return shown


def score_controlnet(
    pipeline: StableDiffusionPipeline, options: argparse.Namespace
) -> list[Image.Image]:
    """Reports how edges are followed, by captions with and without the shape."""
    rng = np.random.default_rng(300)
    prompts = sample_prompts(options.prompts)
    scenes = [scene for scene, _ in prompts]
    controls = [control_image(scene) for scene in scenes]
    captions = {
        "shape named": [caption for _, caption in prompts],
        "shape not named": [without_shape(caption, scene, rng) for scene, caption in prompts],
    }
    controlled = add_controlnet(pipeline)
    shown = list(controls)
    for title, texts in captions.items():
        plain = paint_prompts(pipeline, texts, options.steps, options.guidance)
        report(f"canny, {title}, without", control_rates(scenes, as_arrays(plain)))
        steered = paint_prompts(controlled, texts, options.steps, options.guidance, controls)
        report(f"canny, {title}, with", control_rates(scenes, as_arrays(steered)))
        shown += plain + steered
    return shown


def main() -> None:
    """Scores what is asked for, by default everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("effects", nargs="*", default=["outline", "checker", "canny"])
    parser.add_argument("--model", type=Path, default=PACKAGED)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sheets", type=Path, help="write all images to this folder")
    options = parser.parse_args()
    pipeline = load_pipeline(options.model, "ddim")
    for effect in options.effects:
        if effect == "canny":
            shown = score_controlnet(pipeline, options)
        else:
            shown = score_lora(pipeline, effect, options)
        if options.sheets:
            save_grid(shown, options.prompts, options.sheets / f"{effect}.png")


if __name__ == "__main__":
    main()
