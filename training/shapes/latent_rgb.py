"""Fits the linear map from scaled latents to RGB that previews use, and prints it as YAML.

Least squares over drawings: 8x8 blocks of pixels, averaged, against the latents of the same place.
The result belongs in configs/models.yaml, `latent_rgb` of `shapes`.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from draw import paint, sample_scene
from train_unet import encode

OUT = Path(__file__).parent / "out"
FITTED, HELD_OUT = 200, 50


def samples(vae: AutoencoderKL, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Latents with a constant 1 (n, 5) and colours on [-1, 1] (n, 3)."""
    rng = np.random.default_rng(seed)
    images = [paint(sample_scene(rng)) for _ in range(count)]
    latents = encode(vae, images, "cpu").permute(0, 2, 3, 1).reshape(-1, 4)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    colours = F.avg_pool2d(pixels, 8).permute(0, 2, 3, 1).reshape(-1, 3)
    return torch.cat([latents, torch.ones(len(latents), 1)], dim=1), colours


def main() -> None:
    vae = AutoencoderKL.from_pretrained(OUT / "vae").eval()
    latents, colours = samples(vae, 11, FITTED)
    factors = torch.linalg.lstsq(latents, colours).solution
    unseen, truth = samples(vae, 12, HELD_OUT)
    residual = (unseen @ factors - truth).square().sum() / (truth - truth.mean(0)).square().sum()
    print(f"# explains {1 - float(residual):.0%} of the variance of {HELD_OUT} unseen drawings")
    print("latent_rgb:")
    for row in factors.tolist():
        print("  - [" + ", ".join(f"{value:.4f}" for value in row) + "]")


if __name__ == "__main__":
    main()
