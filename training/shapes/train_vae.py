"""Trains the autoencoder of the `shapes` model on drawings.

Colours are put on at each step, so a few thousand masks make an endless supply of drawings.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from draw import COLOURS, coverage_of, sample_scene

OUT = Path(__file__).parent / "out"
KL_WEIGHT = 2e-3
EDGE_WEIGHT = 0.5
PEAK_RATE = 2e-3


def build_vae() -> AutoencoderKL:
    """SD 1.5's autoencoder, small: factor 8, four latent channels, no attention in the middle."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
    )


def mask_pool(count: int, seed: int, style: str = "solid") -> Tensor:
    """Coverage of random scenes as bytes, (count, 128, 128)."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    masks = [coverage_of(s, style=style) for s in scenes]
    return torch.from_numpy((np.stack(masks) * 255).astype(np.uint8))


def colour_in(masks: Tensor) -> Tensor:
    """Masks painted in two random, different colours, (n, 3, height, width) in [-1, 1]."""
    palette = torch.tensor(list(COLOURS.values()), device=masks.device) / 127.5 - 1
    ink = torch.randint(len(palette), (len(masks),), device=masks.device)
    shift = torch.randint(1, len(palette), (len(masks),), device=masks.device)
    ground = (ink + shift) % len(palette)
    ink_colour, ground_colour = palette[ink, :, None, None], palette[ground, :, None, None]
    return ground_colour + masks[:, None] / 255 * (ink_colour - ground_colour)


def edge_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 between the pixel gradients: what keeps edges sharp and flat areas flat."""
    error = output - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def batch_of(pool: Tensor, size: int, crop: int) -> Tensor:
    """Coloured crops of random drawings; small crops make the early steps cheap."""
    masks = pool[torch.randint(len(pool), (size,), device=pool.device)]
    top, left = torch.randint(masks.shape[-1] - crop + 1, (2,)).tolist()
    return colour_in(masks[:, top : top + crop, left : left + crop])


def vae_loss(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """The training loss, and the squared error alone."""
    posterior = vae.encode(images).latent_dist
    output = vae.decode(posterior.sample()).sample.float()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    loss = F.l1_loss(output, images) + EDGE_WEIGHT * edge_loss(output, images) + KL_WEIGHT * kl
    return loss, F.mse_loss(output.detach(), images)


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, pool: Tensor) -> float:
    """The factor that gives latents of drawings unit variance."""
    latents = [vae.encode(batch_of(pool, 32, 128)).latent_dist.mean for _ in range(16)]
    return float(1 / torch.cat(latents).std())


@torch.no_grad()
def validate(vae: AutoencoderKL, pool: Tensor) -> float:
    """Mean squared error on [-1, 1] over unseen masks, from the mean of the posterior."""
    errors = []
    for _ in range(8):
        images = batch_of(pool, 16, 128)
        errors.append(F.mse_loss(vae.decode(vae.encode(images).latent_dist.mode()).sample, images))
    return float(torch.stack(errors).mean())


def train(steps: int, batch: int, device: str) -> None:
    """Trains on 64-pixel crops, in the last quarter on whole drawings; saves to out/vae."""
    torch.manual_seed(0)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    pool, unseen = mask_pool(4096, seed=0).to(device), mask_pool(256, seed=1).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=1e-4)
    schedule = OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(steps):
        images = batch_of(pool, batch, 64 if step < steps * 0.75 else 128)
        loss, mse = vae_loss(vae, images.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step} loss {loss:.4f} mse {mse:.5f} {seconds:.0f} s", flush=True)
        if step % 1000 == 999:
            vae.save_pretrained(OUT / "vae-partial")
    vae.eval()
    vae.register_to_config(scaling_factor=latent_scale(vae, pool))
    vae.save_pretrained(OUT / "vae")
    for worthless in ("pool.pt", "unet.pt"):  # they belong to the autoencoder before this one
        (OUT / worthless).unlink(missing_ok=True)
    error = validate(vae, unseen)
    psnr = 10 * np.log10(4 / error)
    print(f"validation mse {error:.5f} psnr {psnr:.1f} dB, scaling {vae.config.scaling_factor:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    train(options.steps, options.batch, options.device)
