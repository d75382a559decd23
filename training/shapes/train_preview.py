"""Trains the decoder of previews of `shapes`, and writes it into the package."""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from draw import paint, sample_scene
from export import PACKAGED
from train_unet import encode
from training.preview import train_preview

OUT = Path(__file__).parent / "out"
DRAWINGS = 2048
NAME = "shapes-preview"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    options = parser.parse_args()
    rng = np.random.default_rng(11)
    images = [paint(sample_scene(rng)) for _ in range(DRAWINGS)]
    vae = AutoencoderKL.from_pretrained(PACKAGED / "vae", dtype=torch.float32).eval()
    latents = torch.cat([encode(vae, images[i : i + 32], "cpu") for i in range(0, DRAWINGS, 32)])
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    OUT.mkdir(exist_ok=True)
    train_preview(latents, pixels, PACKAGED.with_name(NAME), OUT / "preview.pt", options.minutes)


if __name__ == "__main__":
    main()
