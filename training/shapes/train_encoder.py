"""Teaches a copy of the autoencoder's encoder to see outlines and checkers.

The decoder can paint them, but the packaged encoder, which knows filled shapes only, does not find
the latents that make it do so. Only train_lora.py uses the copy: the LoRA learns from its latents,
and the decoder that the model ships with paints them.
"""

import argparse
import time

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from draw import STYLES
from export import PACKAGED
from train_vae import EDGE_WEIGHT, OUT, batch_of, colour_in, edge_loss, mask_pool

ENCODER = OUT / "encoder"
PEAK_RATE = 2e-3
LATENT_WEIGHT = 1e-3
"""Keeps the latents near those that the UNet knows."""


def freeze_decoder(vae: AutoencoderKL) -> list[Tensor]:
    """Leaves the encoder alone to be trained; returns its parameters."""
    vae.requires_grad_(False)
    trained = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def reconstruct(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """The latents of images, and what the decoder makes of them."""
    latents = vae.encode(images).latent_dist.mode()
    return latents, vae.decode(latents).sample


def painting_loss(output: Tensor, images: Tensor) -> Tensor:
    """What the decoder's output lacks: L1, and L1 of the pixel gradients."""
    return F.l1_loss(output, images) + EDGE_WEIGHT * edge_loss(output, images)


def encoder_loss(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The autoencoder's own loss, of the latents that train_lora.py starts from: no sampling."""
    latents, output = reconstruct(vae, images)
    return painting_loss(output, images) + LATENT_WEIGHT * latents.square().mean()


@torch.no_grad()
def validate(vae: AutoencoderKL, count: int = 64) -> dict[str, float]:
    """Mean squared error on [-1, 1] of unseen drawings of each style."""
    errors = {}
    for style in STYLES:
        torch.manual_seed(1)
        images = colour_in(mask_pool(count, 1, style))
        errors[style] = float(F.mse_loss(reconstruct(vae, images)[1], images))
    return errors


def report(title: str, vae: AutoencoderKL) -> None:
    errors = (f"{style} {error:.4f}" for style, error in validate(vae).items())
    print(f"{title}: mse {', '.join(errors)}", flush=True)


def train(vae: AutoencoderKL, pool: Tensor, steps: int, batch: int) -> None:
    """Trains on 64-pixel crops, in the last quarter on whole drawings."""
    trained = freeze_decoder(vae)
    optimizer = torch.optim.AdamW(trained, weight_decay=1e-4)
    schedule = OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(steps):
        images = batch_of(pool, batch, 64 if step < steps * 0.75 else 128)
        loss = encoder_loss(vae, images.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            seconds = time.monotonic() - started
            print(f"step {step + 1} loss {loss:.4f} {seconds:.0f} s", flush=True)


def main() -> None:
    """Trains the copy and writes it, with the unchanged decoder, to out/encoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=12)
    options = parser.parse_args()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(PACKAGED / "vae", dtype=torch.float32)
    vae = vae.to(memory_format=torch.channels_last)
    pool = torch.cat([mask_pool(700, 3, style) for style in STYLES])
    report("as packaged", vae)
    train(vae, pool, options.steps, options.batch)
    report("taught", vae)
    vae.save_pretrained(ENCODER)


if __name__ == "__main__":
    main()
