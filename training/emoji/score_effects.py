"""Judges the LoRAs and the ControlNet of `emoji`, with and without each; writes out/effects.json.

Also draws out/effects.png. All are judged by pixels: pixel art by where colours change, outlines by
how many colours there are, the ControlNet by the edges of what it makes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from torch import Tensor
from torch.nn import functional as F

from training.emoji.captions import COLOURS
from training.emoji.edges import edges_of
from training.emoji.effects import BLOCK, STYLES
from training.emoji.icons import OUT, read_index, read_pictures
from training.emoji.score import GUIDANCE, STEPS, generate, prompt_of, questions, real, save_grid

COUNT, SHOWN = 48, 8
NEAR = 2
"""Pixels that an edge may be away from where it should be."""
CLOSE = 0.3
"""How far from a colour, on [-1, 1], a pixel may be to count as that colour."""

Row = dict[str, str | float]


def on_blocks(images: Tensor) -> float:
    """The part of all changes between neighbouring pixels that lies where blocks meet."""
    found = whole = 0.0
    for change in (images.diff(dim=-1), images.diff(dim=-2).transpose(-1, -2)):
        size = change.abs()
        found += float(size[..., BLOCK - 1 :: BLOCK].sum())
        whole += float(size.sum())
    return found / whole


def in_two_colours(images: Tensor, grounds: Tensor) -> float:
    """The part of the pixels that have the background's colour, (n, 3) in [0, 1], or the ink's."""
    ground = (grounds * 2 - 1)[:, :, None, None]
    dark = (images.amax(1) < -0.9 + CLOSE) | (images.amin(1) > 1 - CLOSE)
    return float((dark | ((images - ground).abs().amax(1) < CLOSE)).float().mean())


def edge_score(images: Tensor, edges: Tensor) -> float:
    """F1 of the edges of pictures against those asked for, NEAR pixels tolerated."""
    made, asked = edges_of(images).float() / 255, edges.float() / 255
    kernel = 2 * NEAR + 1
    around_made, around_asked = (F.max_pool2d(x, kernel, 1, NEAR) for x in (made, asked))
    precision = (made * around_asked).sum() / made.sum().clamp(min=1)
    recall = (asked * around_made).sum() / asked.sum()
    return float(2 * precision * recall / (precision + recall).clamp(min=1e-6))


@torch.no_grad()
def controlled(
    pipeline: StableDiffusionControlNetPipeline, prompts: list[str], edges: Tensor, weight: float
) -> Tensor:
    made = pipeline(
        prompts,
        edges.expand(-1, 3, -1, -1).float() / 255,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        controlnet_conditioning_scale=weight,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    )
    images: Tensor = made.images.float().cpu() * 2 - 1
    return images


def score(out: Path) -> None:
    """Judges what train_lora.py and train_controlnet.py have left in `out`."""
    icons = read_index(out / "icons.zip")
    asked = [question for question in questions(icons) if question.group == "trained"][:COUNT]
    prompts = [prompt_of(question, icons[question.icon]) for question in asked]
    grounds = torch.tensor([COLOURS[question.background] for question in asked]) / 255
    truth = real(asked, read_pictures(out / "icons.zip"))
    pipeline = StableDiffusionPipeline.from_pretrained(out / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    plain = generate(pipeline, prompts)
    shown, rows = [plain[:SHOWN]], list[Row]()
    for style, draw in STYLES.items():
        pipeline.load_lora_weights(out / f"emoji-{style}", adapter_name=style)
        made = generate(pipeline, prompts)
        pipeline.unload_lora_weights()
        shown.append(made[:SHOWN])
        for name, images in (("drawn", draw(truth, grounds)), ("0", plain), ("1", made)):
            values = {
                "on blocks": on_blocks(images),
                "two colours": in_two_colours(images, grounds),
            }
            rows.append({"addition": style, "weight": name, "captions": "all"} | values)
    controlnet = ControlNetModel.from_pretrained(out / "emoji-canny", dtype=torch.float32)
    edges = edges_of(truth)
    shown.append(edges[:SHOWN].expand(-1, 3, -1, -1).float() / 127.5 - 1)
    parts = pipeline.components | {"controlnet": controlnet}
    following = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    following.set_progress_bar_config(disable=True)
    for captions, texts in (("all", prompts), ("none", [""] * len(prompts))):
        for weight in (0.0, 1.0):
            made = controlled(following, texts, edges, weight)
            if weight:
                shown.append(made[:SHOWN])
            row: Row = {"addition": "canny", "weight": f"{weight:.0f}", "captions": captions}
            rows.append(row | {"edges": edge_score(made, edges)})
    save_grid(torch.cat(shown), out / "effects.png", SHOWN)
    (out / "effects.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    score(parser.parse_args().out)


if __name__ == "__main__":
    main()
