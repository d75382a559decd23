"""Writes `emoji` as diffusers loads it, in float16, from the last checkpoint: out/pipeline."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from training.emoji import train_text
from training.emoji.icons import OUT
from training.emoji.networks import FULL, TOY, Scale, build_scheduler
from training.emoji.train_unet import build, training_of
from training.saving import ORIGIN, forget
from training.tokenizer import save_tokenizer


def export(out: Path, scale: Scale) -> None:
    """Writes out/pipeline with averaged weights from the last checkpoint."""
    if not any((out / name).exists() for name in ("unet.pt", "unet.start.pt")):
        raise SystemExit("there is no checkpoint to export")
    unet = build(out, scale, "cpu")
    training_of(unet, out).use_averages()
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
    forget(out / "pipeline.new", ORIGIN)
    shutil.rmtree(out / "pipeline", ignore_errors=True)
    (out / "pipeline.new").rename(out / "pipeline")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    export(options.out, TOY if options.toy else FULL)


if __name__ == "__main__":
    main()
