"""Scores the `shapes` model: images of 200 prompts, judged from their pixels.

The judge is first tested on true drawings, and on the same drawings sent through the
autoencoder, which is the best that the UNet could reach.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from PIL import Image

from draw import Scene, caption_of, paint, sample_scene
from judge import Pixels, judge, marks

PIPELINE = Path(__file__).parent / "out" / "pipeline"
SCHEDULERS = {"ddim": DDIMScheduler, "dpm++2m": DPMSolverMultistepScheduler}
ASPECTS = ("background", "colour", "shape", "size")
Prompt = tuple[Scene, str]


def sample_prompts(count: int) -> list[Prompt]:
    """Captions as people type them; all name the colour, seven of ten the background."""
    rng = np.random.default_rng(200)
    prompts: list[Prompt] = []
    while len(prompts) < count:
        named = rng.random() < 0.7
        scene = sample_scene(rng, named)
        caption = caption_of(scene, rng, named)
        if f"{scene.colour} {scene.shape}" in caption:
            prompts.append((scene, caption))
    return prompts


def names_size(caption: str) -> bool:
    """Whether the caption asks for a size at all; only then is the size scored."""
    return any(word in caption.split() for word in ("small", "little", "tiny", "large", "big"))


def paint_prompts(
    pipeline: DiffusionPipeline,
    captions: Sequence[str],
    steps: int,
    guidance: float,
    controls: Sequence[Image.Image] = (),
) -> list[Image.Image]:
    """One image a caption; the seed is the caption's place in the list.

    `controls` has one image a caption where the pipeline has a ControlNet, else none.
    """
    images: list[Image.Image] = []
    for start in range(0, len(captions), 20):
        batch = list(captions[start : start + 20])
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        control = {"image": list(controls[start : start + 20])} if controls else {}
        images += pipeline(
            batch,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=128,
            width=128,
            generator=seeds,
            **control,
        ).images
    return images


@torch.no_grad()
def through_vae(pipeline: StableDiffusionPipeline, images: Sequence[Pixels]) -> list[Pixels]:
    """The images encoded and decoded again."""
    decoded: list[Pixels] = []
    for start in range(0, len(images), 20):
        pixels = torch.from_numpy(np.stack(images[start : start + 20])).permute(0, 3, 1, 2)
        latents = pipeline.vae.encode(pixels / 127.5 - 1).latent_dist.mode()
        output = pipeline.vae.decode(latents).sample.permute(0, 2, 3, 1)
        decoded += list((output.clamp(-1, 1) * 127.5 + 127.5).numpy())
    return decoded


def all_right(result: dict[str, bool]) -> bool:
    """Whether everything but the size is as asked."""
    return all(result[name] for name in ASPECTS[:3])


def rates(prompts: Sequence[Prompt], images: Sequence[Pixels]) -> dict[str, float]:
    """The share of prompts for which each aspect, and all of them but the size, are right."""
    results = [marks(judge(p), scene) for p, (scene, _) in zip(images, prompts, strict=True)]
    asked = [names_size(caption) for _, caption in prompts]
    part = {name: float(np.mean([r[name] for r in results])) for name in ASPECTS}
    part["all three"] = float(np.mean([all_right(r) for r in results]))
    part["size"] = float(
        np.mean([r["size"] for r, sized in zip(results, asked, strict=True) if sized])
    )
    return part


def report(title: str, prompts: Sequence[Prompt], images: Sequence[Pixels]) -> None:
    """Prints one line of the score table."""
    cells = (f"{name} {100 * rate:.1f}%" for name, rate in rates(prompts, images).items())
    print(f"{title}: {', '.join(cells)}", flush=True)


def report_mistakes(prompts: Sequence[Prompt], images: Sequence[Pixels]) -> None:
    """Lists the prompts whose image is wrong, with what the judge saw."""
    for i, ((scene, caption), image) in enumerate(zip(prompts, images, strict=True)):
        verdict = judge(image)
        if not all_right(marks(verdict, scene)):
            print(f"{i:4} {caption!r} ({scene.background}): {verdict}")


def save_grid(images: Sequence[Image.Image], columns: int, path: Path) -> None:
    """All images on one sheet."""
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    sheet.save(path, optimize=True)


def load_pipeline(folder: Path, scheduler: str) -> StableDiffusionPipeline:
    """The stock pipeline in float32, with one of the two schedulers."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    """Scores the judge, the autoencoder and the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=PIPELINE)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddim")
    parser.add_argument("--sheet", type=Path, help="write all images to this file")
    parser.add_argument("--mistakes", action="store_true", help="list what went wrong")
    options = parser.parse_args()
    pipeline = load_pipeline(options.model, options.scheduler)
    prompts = sample_prompts(options.prompts)
    drawings = [paint(scene) for scene, _ in prompts]
    report("true drawings", prompts, drawings)
    report("through the autoencoder", prompts, through_vae(pipeline, drawings))
    started = time.monotonic()
    captions = [caption for _, caption in prompts]
    images = paint_prompts(pipeline, captions, options.steps, options.guidance)
    seconds = time.monotonic() - started
    pixels = [np.asarray(image, dtype=np.float32) for image in images]
    report(f"model, {len(prompts)} prompts in {seconds:.0f} s", prompts, pixels)
    if options.mistakes:
        report_mistakes(prompts, pixels)
    if options.sheet:
        save_grid(images, 20, options.sheet)


if __name__ == "__main__":
    main()
