"""Trains the decoder of a model's previews: an AutoencoderTiny, latents to small pictures.

Models of the Hub get by with a linear map from latents to colours. The latents of small models say
less by themselves, and more by what is around them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from training.emoji.budget import Budget, Training
from training.saving import ORIGIN, forget

CHANNELS, BATCH = 32, 32
PEAK_RATE, DECAY = 2e-3, 0.99
HELD_OUT = 16
"""One in so many is not trained on, but measured."""
SHRUNK = 2
"""Previews have so many times fewer pixels in each direction than images."""


def build() -> AutoencoderTiny:
    """The encoder, which nobody uses, is as small as can be."""
    return AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(CHANNELS,) * 3,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(2, 1, 1),
    )


def train_preview(
    latents: Tensor, images: Tensor, folder: Path, checkpoint: Path, minutes: float
) -> None:
    """Writes the decoder into `folder`, and prints what it explains of pictures held out.

    `latents` (n, 4, h, w) are scaled as the UNet sees them, `images` (n, 3, 8 h, 8 w) in [-1, 1].
    A run that was cut off goes on from `checkpoint`.
    """
    torch.manual_seed(6)
    images, device = F.avg_pool2d(images, SHRUNK), latents.device
    network = build().to(device)
    network.encoder.requires_grad_(False)
    training = Training(network, PEAK_RATE, checkpoint, DECAY)
    unseen = len(latents) // HELD_OUT

    def loss() -> Tensor:
        rows = torch.randint(unseen, len(latents), (BATCH,), device=device)
        return F.mse_loss(network.decode(latents[rows]).sample, images[rows])

    training.run(loss, BATCH, Budget(minutes * 60))
    training.use_averages()
    measure(network, latents, images, unseen)
    network.half().save_pretrained(folder)
    forget(folder, ORIGIN, "block_out_channels")  # which it would warn of


def explained(found: Tensor, truth: Tensor) -> float:
    """The part of the variance of colours (n, 3, h, w) that was found (R2)."""
    mean = truth.mean((0, 2, 3), keepdim=True)
    return 1 - float((found - truth).square().sum() / (truth - mean).square().sum())


def linear_map(latents: Tensor, colours: Tensor) -> Tensor:
    """The least-squares map (5, 3) from latents and a constant to the colours at their places."""
    ones = torch.ones_like(latents[:, :1])
    features = torch.cat([latents, ones], dim=1).movedim(1, -1).flatten(0, -2)
    factors: Tensor = torch.linalg.lstsq(features, colours.movedim(1, -1).flatten(0, -2)).solution
    return factors


@torch.no_grad()
def measure(network: AutoencoderTiny, latents: Tensor, images: Tensor, unseen: int) -> None:
    """Compares the decoder with a linear map, on the first pictures, which neither has seen."""
    colours = F.avg_pool2d(images, 8 // SHRUNK)
    factors = linear_map(latents[unseen:], colours[unseen:])
    latents, images, colours = (part[:unseen] for part in (latents, images, colours))
    decoded = torch.cat([network.decode(part).sample for part in latents.split(BATCH)])
    blocks = F.avg_pool2d(decoded, 8 // SHRUNK)
    mapped = torch.einsum("nchw,cr->nrhw", latents, factors[:-1]) + factors[-1, :, None, None]
    by_decoder, by_map = explained(blocks, colours), explained(mapped, colours)
    print(f"of the colours of 8x8 pixels: decoder {by_decoder:.3f}, linear map {by_map:.3f}")
    print(f"of all pixels: decoder {explained(decoded, images):.3f}", flush=True)
