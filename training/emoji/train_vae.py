"""Trains the autoencoder of `emoji` on icons on backgrounds; writes out/vae.

Latents of everything that follows depend on it. So once out/vae is there, this does nothing.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from training.emoji.budget import Budget, Training, autocast, default_device, memory_format
from training.emoji.compose import compose, random_layout
from training.emoji.icons import read_pictures
from training.emoji.networks import FULL, TOY, Scale, build_vae

KL_WEIGHT, EDGE_WEIGHT = 1e-3, 0.5
PEAK_RATE, DECAY = 1e-3, 0.998
ANY_COLOUR = 0.5


def edge_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 between the pixel gradients: what keeps edges sharp and flat areas flat."""
    error = output - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def sample(pictures: Tensor, count: int) -> Tensor:
    """Random icons on random backgrounds, (count, 3, side, side)."""
    icons = torch.randint(len(pictures), (count,), device=pictures.device)
    return compose(pictures, random_layout(icons, ANY_COLOUR))


def loss_of(vae: AutoencoderKL, images: Tensor, device: str) -> Tensor:
    with autocast(device):
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.sample()).sample
    output = output.float()
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    loss: Tensor = F.l1_loss(output, images) + EDGE_WEIGHT * edge_loss(output, images)
    loss += KL_WEIGHT * kl
    return loss


@torch.no_grad()
def finish(vae: AutoencoderKL, pictures: Tensor, folder: Path) -> None:
    """Measures the scale of the latents and the error, and writes the autoencoder."""
    images = torch.cat([sample(pictures, 16) for _ in range(8)])
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(16)])
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(16)]).clamp(-1, 1)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    error = F.mse_loss(decoded, images).item()
    psnr = 10 * math.log10(4 / error)
    print(f"PSNR {psnr:.1f} dB, scaling {vae.config.scaling_factor:.3f}", flush=True)
    vae.save_pretrained(folder)


def train(out: Path, scale: Scale, budget: Budget, device: str) -> None:
    torch.manual_seed(0)
    pictures = read_pictures(out / "icons.zip").to(device)
    order = memory_format(device)
    vae = build_vae(scale).to(device, memory_format=order)
    training = Training(vae, PEAK_RATE, out / "vae.pt", DECAY)

    def loss() -> Tensor:
        images = sample(pictures, scale.vae_batch)
        return loss_of(vae, images.contiguous(memory_format=order), device)

    training.run(loss, scale.vae_batch, budget)
    training.use_averages()
    finish(vae, pictures, out / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--batch", type=int, help="pictures a step; a CPU wants fewer")
    parser.add_argument("--device", default=default_device())
    options = parser.parse_args()
    if (options.out / "vae" / "config.json").exists():
        print("the autoencoder is there; nothing to do")
        return
    budget = Budget(options.minutes * 60)
    scale = TOY if options.toy else FULL
    scale = replace(scale, vae_batch=options.batch or scale.vae_batch)
    train(options.out, scale, budget, options.device)


if __name__ == "__main__":
    main()
