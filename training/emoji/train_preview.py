"""Trains the decoder of previews of `emoji`; writes out/emoji-preview."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training.emoji.budget import default_device
from training.emoji.icons import OUT
from training.emoji.pool import composed, load_pool, load_scenes
from training.preview import train_preview

SCENES = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--device", default=default_device())
    options = parser.parse_args()
    out, device = options.out, options.device
    layout, _ = load_scenes(out, SCENES)
    images = torch.cat([*composed(out, layout, device)])
    latents = load_pool(out, device).latents[:SCENES].float()
    train_preview(latents, images, out / "emoji-preview", out / "preview.pt", options.minutes)


if __name__ == "__main__":
    main()
