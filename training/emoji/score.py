"""Judges pictures that `emoji` makes, and draws a grid of them; writes out/score.json.

The classifier names the icon, pixels tell the background. Real pictures, and real pictures
through the autoencoder, are judged too: they show how far the judge can be trusted.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from training.emoji.budget import autocast, default_device
from training.emoji.captions import (
    COLOURS,
    STYLES,
    Scene,
    background_words,
    held_out_icons,
    is_held_out_combination,
    with_article,
)
from training.emoji.compose import Layout, compose, layout_of
from training.emoji.icons import OUT, Icon, read_index, read_pictures
from training.emoji.networks import FULL, TOY, Classifier, Scale
from training.emoji.train_classifier import load

PICTURES = {"trained": 250, "held-out combination": 150, "held-out icon": 100}
STEPS, GUIDANCE = 20, 2.0
REWORDED = 100
WORDINGS = (
    "could you paint {} for my homepage",
    "{}, ultra sharp, volumetric light, hdr",
    "an adorable drawing of {} near the old mill",
    "professional artwork: {}, rule of thirds, by a famous painter",
)
"""Other words than those of training around the prompts of the first REWORDED questions."""
BORDER = 4  # pixels at the picture's edge, where there is only background
GRID = (
    "a bento box",
    "a red apple on a blue background",
    "a cat face, flat style",
    "a rocket and a crescent moon, 3d style",
    "a birthday cake on a pink background",
    "a penguin, noto style",
    "a robot on a yellow background, twemoji style",
    "a smiling face with sunglasses",
    "a small sunflower on a black background",
    "a pizza and a hot dog, flat style",
    "a guitar on the left",
    "a large ghost on a purple background",
    "an umbrella on a light blue background, 3d style",
    "a fox next to a bear, noto style",
    "a green apple, flat style",
    "a car on a grey background",
    "a house, twemoji style",
    "a fire on a black background",
    "a tiger face",
    "an airplane on a light blue background",
    "a big blue heart",
    "a crocodile on an orange background, noto style",
    "a dog face and a cat face",
    "a cup of tea on a brown background",
)


@dataclass(frozen=True)
class Question:
    """One icon on one background, and whether training has shown that."""

    group: str
    icon: int
    background: str


def questions(icons: Sequence[Icon], seed: int = 9) -> list[Question]:
    """As many of each group as PICTURES says, or as there are; none twice."""
    held_out = held_out_icons(icons)
    groups: dict[str, list[Question]] = {group: [] for group in PICTURES}
    for index, icon in enumerate(icons):
        for background in COLOURS:
            if index in held_out:
                group = "held-out icon"
            elif is_held_out_combination(icon, background):
                group = "held-out combination"
            else:
                group = "trained"
            groups[group].append(Question(group, index, background))
    rng = np.random.default_rng(seed)
    return [
        own[int(row)]
        for group, own in groups.items()
        for row in rng.permutation(len(own))[: PICTURES[group]]
    ]


def prompt_of(question: Question, icon: Icon, wording: str = "{}") -> str:
    ground = background_words("on a {} background", question.background)
    subject = wording.format(f"{with_article(icon.name)} {ground}")
    return f"{subject}, {STYLES[icon.style][0]}"


@torch.no_grad()
def generate(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int = 0) -> Tensor:
    """Pictures (n, 3, side, side) in [-1, 1]; the same seed gives the same."""
    images = []
    for start in range(0, len(prompts), 128):
        generator = torch.Generator().manual_seed(seed + start)
        made = pipeline(
            prompts[start : start + 128],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generator,
            output_type="pt",
        )
        images.append(made.images.float().cpu() * 2 - 1)
    return torch.cat(images)


def backgrounds_of(images: Tensor) -> list[str]:
    """The colour of the palette that the border has, by its median."""
    edge = torch.ones(images.shape[-2:], dtype=torch.bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    colour = images[:, :, edge].median(dim=-1).values
    palette = torch.tensor([*COLOURS.values()]) / 127.5 - 1
    nearest = torch.cdist(colour, palette).argmin(dim=1)
    return [[*COLOURS][index] for index in nearest.tolist()]


@torch.no_grad()
def ranks_of(images: Tensor, classifier: Classifier, classes: Sequence[int]) -> list[int]:
    """How many names the classifier finds more likely than the right one."""
    device = next(classifier.parameters()).device
    with autocast(device.type):
        parts = [classifier(part.to(device)).float().cpu() for part in images.split(128)]
    logits = torch.cat(parts)
    right = logits.gather(1, torch.tensor(classes)[:, None])
    ranks: list[int] = (logits > right).sum(dim=1).tolist()
    return ranks


def table(
    source: str, asked: list[Question], images: Tensor, classifier: Classifier, icons: list[Icon]
) -> list[dict[str, str | int | float]]:
    """Rates of one source of pictures, one row for each group of questions."""
    names = sorted({icon.name for icon in icons})
    classes = [names.index(icons[question.icon].name) for question in asked]
    ranks = ranks_of(images, classifier, classes)
    grounds = backgrounds_of(images)
    rows: list[dict[str, str | int | float]] = []
    for group in PICTURES:
        own = [i for i, question in enumerate(asked) if question.group == group]
        if own:
            rows.append(
                {
                    "pictures": source,
                    "group": group,
                    "count": len(own),
                    "top 1": _rate(ranks[i] == 0 for i in own),
                    "top 5": _rate(ranks[i] < 5 for i in own),
                    "background": _rate(grounds[i] == asked[i].background for i in own),
                }
            )
    return rows


def _rate(hits: Iterable[bool]) -> float:
    found = list(hits)
    return round(sum(found) / len(found), 3)


def real(asked: list[Question], pictures: Tensor) -> Tensor:
    """What a perfect model would have made."""
    scenes = [Scene((q.icon,), ((0.5, 0.5, 0.74),), q.background, "") for q in asked]
    layout: Layout = layout_of(scenes)
    return torch.cat(
        [
            compose(pictures, layout.rows(slice(start, start + 32), "cpu"))
            for start in range(0, len(asked), 32)
        ]
    )


@torch.no_grad()
def through_autoencoder(pipeline: StableDiffusionPipeline, images: Tensor) -> Tensor:
    vae = pipeline.vae
    parts = [
        vae.decode(vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode()).sample
        for part in images.split(64)
    ]
    return torch.cat(parts).float().cpu().clamp(-1, 1)


def save_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    rows = [torch.cat(list(part), dim=2) for part in images.split(columns)]
    grid = torch.cat([row for row in rows if row.shape == rows[0].shape], dim=1)
    pixels = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)


def score(out: Path, scale: Scale, device: str, count: int | None) -> None:
    """Judges the pipeline in out/pipeline; `count` limits the questions of each group."""
    icons = read_index(out / "icons.zip")
    asked = questions(icons)
    if count is not None:
        asked = [q for i, q in enumerate(asked) if i % max(1, len(asked) // count) == 0]
    pipeline = StableDiffusionPipeline.from_pretrained(out / "pipeline", dtype=torch.float32)
    pipeline.to(device).set_progress_bar_config(disable=True)
    save_grid(generate(pipeline, list(GRID[: count or len(GRID)])), out / "samples.png")
    classifier = load(out, scale, device)
    truth = real(asked, read_pictures(out / "icons.zip"))
    decoded = through_autoencoder(pipeline, truth)
    save_grid(torch.cat([truth[:8], decoded[:8]]), out / "autoencoder.png")
    made = generate(pipeline, [prompt_of(q, icons[q.icon]) for q in asked])
    again = asked[:REWORDED]
    wordings = itertools.cycle(WORDINGS)
    others = [prompt_of(q, icons[q.icon], next(wordings)) for q in again]
    sources = (
        ("real", asked, truth),
        ("through the autoencoder", asked, decoded),
        ("emoji", asked, made),
        ("emoji, other words added", again, generate(pipeline, others)),
    )
    rows = [
        row
        for source, questioned, images in sources
        for row in table(source, questioned, images, classifier, icons)
    ]
    (out / "score.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--device", default=default_device())
    options = parser.parse_args()
    scale, count = (TOY, 4) if options.toy else (FULL, None)
    score(options.out, scale, options.device, count)


if __name__ == "__main__":
    main()
