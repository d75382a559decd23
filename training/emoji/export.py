"""Writes `emoji` as diffusers loads it, in float16, from the last checkpoint: out/pipeline."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from training.emoji import train_text
from training.emoji.budget import Training
from training.emoji.networks import FULL, TOY, Scale, build_scheduler
from training.emoji.train_unet import DECAY, PEAK_RATE, build
from training.tokenizer import save_tokenizer


def export(out: Path, scale: Scale) -> None:
    """Writes out/pipeline with averaged weights from the last checkpoint."""
    if not any((out / name).exists() for name in ("unet.pt", "unet.start.pt")):
        raise SystemExit("there is no checkpoint to export")
    unet = build(out, scale, "cpu")
    Training(unet, PEAK_RATE, out / "unet.pt", DECAY).use_averages()
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(out / "vae"),
        text_encoder=train_text.load(out, scale, "cpu"),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(out / "pipeline.new", ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(out / "pipeline.new")
    save_tokenizer(tokenizer, out / "pipeline.new" / "tokenizer")
    _forget_origin(out / "pipeline.new")
    shutil.rmtree(out / "pipeline", ignore_errors=True)
    (out / "pipeline.new").rename(out / "pipeline")


def _forget_origin(folder: Path) -> None:
    """Removes the path that diffusers notes in the configuration of what it loaded."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    export(options.out, TOY if options.toy else FULL)


if __name__ == "__main__":
    main()
