"""Trains the UNet of `emoji` on latents of captioned pictures.

The text encoder stays as train_text.py left it. A run that was cut off goes on from out/unet.pt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel

from training.emoji import train_text
from training.emoji.budget import Budget, Training, arguments, autocast, take_start
from training.emoji.networks import FULL, TOY, Scale, build_scheduler, build_unet
from training.emoji.pool import Pool, load_pool

PEAK_RATE, MATRIX_RATE, DECAY = 8e-4, 3e-3, 0.999
SNR_BOUND = 5.0
WARM_UP_STEPS = 3

Predict = Callable[[Tensor, Tensor, Tensor], UNet2DConditionOutput]
"""Noisy latents, timesteps and contexts to v."""


def build(out: Path, scale: Scale, device: str) -> UNet2DConditionModel:
    network = build_unet(scale)
    take_start(network, out / "unet.start.pt")
    return network.to(device, memory_format=torch.channels_last)


def training_of(network: UNet2DConditionModel, out: Path) -> Training:
    return Training(network, PEAK_RATE, out / "unet.pt", DECAY, MATRIX_RATE)


def loss_weights(alphas: Tensor) -> Tensor:
    """Weight of each timestep's squared error of v: (min(SNR, bound) + 1) / (SNR + 1).

    Min-SNR (Hang et al. 2023) for v-prediction; the added 1 keeps the step of pure noise, where
    the caption decides the colours.
    """
    snr = alphas / (1 - alphas)
    return (snr.clamp(max=SNR_BOUND) + 1) / (snr + 1)


class Objective:
    """The weighted error of v (Salimans and Ho 2022) on random latents and captions."""

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, pool: Pool, device: str
    ) -> None:
        self.unet, self.text_encoder, self.pool, self.device = unet, text_encoder, pool, device
        alphas = build_scheduler().alphas_cumprod.to(device)
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()
        self.weights = loss_weights(alphas)

    def __call__(self, batch: int) -> Tensor:
        return self.error(self.unet, *self.pool.batch(batch))

    def error(self, predict: Predict, latents: Tensor, tokens: Tensor) -> Tensor:
        """Of v as `predict` finds it, from noise, timesteps and contexts drawn here."""
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (len(latents),), device=self.device)
        signal, spread = (x[timesteps, None, None, None] for x in (self.signal, self.noise))
        noisy, wanted = signal * latents + spread * noise, signal * noise - spread * latents
        with autocast(self.device):
            with torch.no_grad():
                context = self.text_encoder(tokens).last_hidden_state
            predicted = predict(noisy, timesteps, context).sample
        errors = F.mse_loss(predicted.float(), wanted, reduction="none").mean(dim=(1, 2, 3))
        return (errors * self.weights[timesteps]).mean()


def compile_unet(unet: UNet2DConditionModel) -> None:
    """Compiles the UNet, or leaves it as it is where the compiler fails."""
    torch._dynamo.config.suppress_errors = True
    unet.compile()


def warm_up(out: Path, scale: Scale, device: str) -> None:
    """Compiles on latents of noise, so that the training finds the kernels in inductor's cache."""
    unet = build(out, scale, device)
    compile_unet(unet)
    text_encoder = train_text.build(out, scale).to(device)
    tokens = torch.zeros(scale.unet_batch, 77, dtype=torch.int16, device=device)
    latents = torch.randn(scale.unet_batch, 4, 16, 16, device=device)
    objective = Objective(unet, text_encoder, Pool(latents, tokens, tokens[:1]), device)
    for _ in range(WARM_UP_STEPS):
        objective(scale.unet_batch).backward()
    print("compiled", flush=True)


def train(out: Path, scale: Scale, budget: Budget, device: str, compiled: bool) -> None:
    began = time.monotonic()
    pool = load_pool(out, device)
    unet = build(out, scale, device)
    training = training_of(unet, out)
    torch.manual_seed(training.step)
    if compiled:
        compile_unet(unet)
    objective = Objective(unet, train_text.load(out, scale, device), pool, device)
    millions = sum(parameter.numel() for parameter in training.parameters) / 1e6
    print(f"{millions:.1f} M parameters, from step {training.step}", flush=True)
    left = Budget(budget.seconds - (time.monotonic() - began), budget.min_steps)
    training.run(lambda: objective(scale.unet_batch), scale.unet_batch, left)


def main() -> None:
    parser = arguments(__doc__, minutes=60.0)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--warm-up", action="store_true", help="only compile")
    options = parser.parse_args()
    out, scale = options.out, TOY if options.toy else FULL
    scale = replace(scale, unet_batch=options.batch or scale.unet_batch)
    if options.warm_up:
        warm_up(out, scale, options.device)
        return
    budget = Budget(options.minutes * 60)
    train(out, scale, budget, options.device, options.compile)


if __name__ == "__main__":
    main()
