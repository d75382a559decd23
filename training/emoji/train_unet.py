"""Trains the UNet and the text encoder of `emoji` on latents of captioned pictures.

Captions and layouts are made first (`--prepare`, on the CPU, beside the autoencoder's training).
Then all pictures are encoded once, and training needs nothing but what is on the device. A run
that was cut off goes on from out/unet.pt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from training.emoji.budget import Budget, Training, autocast, default_device, save
from training.emoji.captions import NEGATIVES, Catalogue
from training.emoji.compose import Layout, compose, layout_of
from training.emoji.icons import read_index, read_pictures
from training.emoji.networks import (
    FULL,
    TOY,
    Scale,
    build_scheduler,
    build_text_encoder,
    build_unet,
    tokenize,
)
from training.tokenizer import build_tokenizer, save_tokenizer

PEAK_RATE, DECAY = 8e-4, 0.999
UNSAID = 0.05
"""Of the captions a batch leaves out so many, beside the empty ones that scenes have."""
SNR_BOUND = 5.0
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Pool:
    """Latents (n, 4, 16, 16), scaled, tokens of their captions (n, 77), and of an empty one."""

    latents: Tensor
    tokens: Tensor
    empty: Tensor

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.latents), (size,), device=self.latents.device)
        unsaid = torch.rand(size, 1, device=rows.device) < UNSAID
        return self.latents[rows].float(), torch.where(unsaid, self.empty, self.tokens[rows]).long()


def vocabulary(catalogue: Catalogue) -> Iterator[str]:
    """What the tokenizer learns its merges from: captions, and all words that can occur."""
    rng = np.random.default_rng(7)
    for _ in range(20_000):
        yield catalogue.sample(rng).caption
    for icon in catalogue.icons:
        yield from (icon.name, *icon.synonyms)
    yield from list(NEGATIVES) * 20


def prepare(out: Path, scale: Scale, seed: int) -> None:
    """Writes out/tokenizer, unless it is there, and out/scenes.pt."""
    catalogue = Catalogue(read_index(out / "icons.zip"))
    if not (out / "tokenizer").exists():
        tokenizer = build_tokenizer(vocabulary(catalogue), scale.merges)
        save_tokenizer(tokenizer, out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    rng = np.random.default_rng(seed)
    scenes = [catalogue.sample(rng) for _ in range(scale.scenes)]
    layout = layout_of(scenes)
    tokens = tokenize(tokenizer, [scene.caption for scene in scenes])
    save(out / "scenes.pt", (layout.icons, layout.boxes, layout.backgrounds, tokens))
    print(f"{len(scenes)} scenes, {len(tokenizer)} tokens", flush=True)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, layout: Layout, device: str) -> Tensor:
    """Scaled latents of composed scenes, (n, 4, 16, 16), in half precision on a GPU."""
    size = 512 if device == "cuda" else 32
    vae = vae.to(memory_format=torch.channels_last)
    latents = []
    for start in range(0, len(layout), size):
        images = compose(pictures, layout.rows(slice(start, start + size), device))
        with autocast(device):
            images = images.contiguous(memory_format=torch.channels_last)
            mode = vae.encode(images).latent_dist.mode()
        scaled = mode * vae.config.scaling_factor
        latents.append(scaled.to(torch.bfloat16 if device == "cuda" else torch.float32))
    return torch.cat(latents)


def load_pool(out: Path, device: str) -> Pool:
    started = time.monotonic()
    vae = AutoencoderKL.from_pretrained(out / "vae").to(device, torch.float32).eval()
    *layout, tokens = torch.load(out / "scenes.pt")
    pictures = read_pictures(out / "icons.zip").to(device)
    latents = encode(vae, pictures, Layout(*layout), device)
    empty = tokenize(CLIPTokenizer.from_pretrained(out / "tokenizer"), [""])
    deviation = float(latents.float().std())
    seconds = time.monotonic() - started
    print(f"{len(latents)} latents, deviation {deviation:.3f}, {seconds:.0f} s", flush=True)
    return Pool(latents, tokens.to(device), empty.to(device))


def build(out: Path, scale: Scale, device: str) -> nn.ModuleDict:
    """The two networks; with the weights that an earlier run brought back, if there are any."""
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    networks = {"unet": build_unet(scale), "text_encoder": build_text_encoder(scale, tokenizer)}
    for name, network in networks.items():
        if (out / f"{name}.start.pt").exists():
            network.load_state_dict(torch.load(out / f"{name}.start.pt"))
            print(f"{name}: goes on from an earlier run", flush=True)
    networks["unet"].to(memory_format=torch.channels_last)
    return nn.ModuleDict(networks).to(device)


def loss_weights(alphas: Tensor) -> Tensor:
    """Weight of each timestep's squared error of v: (min(SNR, bound) + 1) / (SNR + 1).

    Min-SNR (Hang et al. 2023) for v-prediction; the added 1 keeps the step of pure noise, where
    the caption decides the colours.
    """
    snr = alphas / (1 - alphas)
    return (snr.clamp(max=SNR_BOUND) + 1) / (snr + 1)


class Objective:
    """The weighted error of v (Salimans and Ho 2022) on random latents and captions."""

    def __init__(self, networks: nn.ModuleDict, pool: Pool, device: str) -> None:
        self.networks, self.pool, self.device = networks, pool, device
        alphas = build_scheduler().alphas_cumprod.to(device)
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()
        self.weights = loss_weights(alphas)

    def __call__(self, batch: int) -> Tensor:
        latents, tokens = self.pool.batch(batch)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (batch,), device=self.device)
        signal, spread = (x[timesteps, None, None, None] for x in (self.signal, self.noise))
        noisy, wanted = signal * latents + spread * noise, signal * noise - spread * latents
        with autocast(self.device):
            context = self.networks["text_encoder"](tokens).last_hidden_state
            predicted = self.networks["unet"](noisy, timesteps, context).sample
        errors = F.mse_loss(predicted.float(), wanted, reduction="none").mean(dim=(1, 2, 3))
        return (errors * self.weights[timesteps]).mean()


def compile_unet(networks: nn.ModuleDict) -> None:
    """Compiles the UNet, or leaves it as it is where the compiler fails."""
    torch._dynamo.config.suppress_errors = True
    networks["unet"].compile()


def warm_up(out: Path, scale: Scale, device: str) -> None:
    """Compiles on latents of noise, so that the training finds the kernels in inductor's cache."""
    networks = build(out, scale, device)
    compile_unet(networks)
    tokens = torch.zeros(scale.unet_batch, 77, dtype=torch.int16, device=device)
    latents = torch.randn(scale.unet_batch, 4, 16, 16, device=device)
    objective = Objective(networks, Pool(latents, tokens, tokens[:1]), device)
    for _ in range(WARM_UP_STEPS):
        objective(scale.unet_batch).backward()
    print("compiled", flush=True)


def train(out: Path, scale: Scale, budget: Budget, device: str, compiled: bool) -> None:
    began = time.monotonic()
    pool = load_pool(out, device)
    networks = build(out, scale, device)
    training = Training(networks, PEAK_RATE, out / "unet.pt", DECAY)
    torch.manual_seed(training.step)
    if compiled:
        compile_unet(networks)
    objective = Objective(networks, pool, device)
    millions = sum(parameter.numel() for parameter in training.parameters) / 1e6
    print(f"{millions:.1f} M parameters, from step {training.step}", flush=True)
    left = Budget(budget.seconds - (time.monotonic() - began), budget.min_steps)
    training.run(lambda: objective(scale.unet_batch), scale.unet_batch, left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--batch", type=int, help="pictures a step; a CPU wants fewer")
    parser.add_argument("--prepare", action="store_true", help="only make captions, and compile")
    parser.add_argument("--seed", type=int, default=2, help="of the captions")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default=default_device())
    options = parser.parse_args()
    out, scale = options.out, TOY if options.toy else FULL
    scale = replace(scale, unet_batch=options.batch or scale.unet_batch)
    if options.prepare:
        prepare(out, scale, options.seed)
        if options.compile:
            warm_up(out, scale, options.device)
        return
    budget = Budget(options.minutes * 60)
    train(out, scale, budget, options.device, options.compile)


if __name__ == "__main__":
    main()
