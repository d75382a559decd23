"""Trains the autoencoder of `emoji` on icons on backgrounds; writes out/vae.

Latents of everything that follows depend on it. So once out/vae is there, this does nothing, or
with `--decoder` it goes on with the decoder alone, for the same latents.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from training.emoji.budget import Budget, Training, arguments, autocast, memory_format
from training.emoji.compose import compose, random_layout
from training.emoji.effects import STYLES
from training.emoji.icons import read_pictures
from training.emoji.networks import FULL, TOY, Scale, build_vae

KL_WEIGHT, EDGE_WEIGHT = 1e-3, 0.5
PEAK_RATE, DECAY = 1e-3, 0.998
ANY_COLOUR = 0.5
STYLED = 0.1
"""So many are pixel art, and so many outlines; or the LoRAs could not draw them."""


def distance(output: Tensor, target: Tensor) -> Tensor:
    """L1 of the pixels, and of their gradients, which keeps edges sharp and flat areas flat."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges


def sample(pictures: Tensor, count: int, styled: float = 0.0) -> Tensor:
    """Random icons on random backgrounds, (count, 3, side, side), some of them in each style."""
    icons = torch.randint(len(pictures), (count,), device=pictures.device)
    layout = random_layout(icons, any_colour=ANY_COLOUR)
    images = compose(pictures, layout)
    for draw in STYLES.values():
        chosen = torch.rand(count, 1, 1, 1, device=images.device) < styled
        images = torch.where(chosen, draw(images, layout.backgrounds), images)
    return images


def loss_of(vae: AutoencoderKL, images: Tensor, device: str) -> Tensor:
    with autocast(device):
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.sample()).sample
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    loss: Tensor = distance(output.float(), images) + KL_WEIGHT * kl
    return loss


def decoder_loss_of(vae: AutoencoderKL, images: Tensor, device: str) -> Tensor:
    with autocast(device):
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
        output = vae.decode(latents).sample
    return distance(output.float(), images)


@torch.no_grad()
def finish(vae: AutoencoderKL, pictures: Tensor, folder: Path) -> None:
    """Measures the error, and the scale of the latents if it is not known; writes out/vae."""
    images = torch.cat([sample(pictures, 16) for _ in range(8)])
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(16)])
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(16)]).clamp(-1, 1)
    if not folder.exists():
        vae.register_to_config(scaling_factor=float(1 / latents.std()))
    error = F.mse_loss(decoded, images).item()
    psnr = 10 * math.log10(4 / error)
    print(f"PSNR {psnr:.1f} dB, scaling {vae.config.scaling_factor:.3f}", flush=True)
    vae.save_pretrained(folder)


def train(out: Path, scale: Scale, budget: Budget, device: str, decoder: bool) -> None:
    torch.manual_seed(0)
    pictures = read_pictures(out / "icons.zip").to(device)
    order = memory_format(device)
    vae = AutoencoderKL.from_pretrained(out / "vae") if decoder else build_vae(scale)
    vae = vae.to(device, memory_format=order).train()
    if decoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    training = Training(vae, PEAK_RATE, out / ("decoder.pt" if decoder else "vae.pt"), DECAY)
    loss_of_images = decoder_loss_of if decoder else loss_of

    def loss() -> Tensor:
        images = sample(pictures, scale.vae_batch, STYLED)
        return loss_of_images(vae, images.contiguous(memory_format=order), device)

    training.run(loss, scale.vae_batch, budget)
    training.use_averages()
    finish(vae, pictures, out / "vae")


def main() -> None:
    parser = arguments(__doc__, minutes=60.0)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--decoder", action="store_true", help="goes on with the decoder alone")
    options = parser.parse_args()
    if (options.out / "vae" / "config.json").exists() and not options.decoder:
        print("the autoencoder is there; nothing to do")
        return
    budget = Budget(options.minutes * 60)
    scale = TOY if options.toy else FULL
    scale = replace(scale, vae_batch=options.batch or scale.vae_batch)
    train(options.out, scale, budget, options.device, options.decoder)


if __name__ == "__main__":
    main()
