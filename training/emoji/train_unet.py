"""Trains the UNet of `emoji` on latents of captioned pictures.

The text encoder stays as train_text.py left it. A run that was cut off goes on from out/unet.pt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
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
from training.emoji.compose import Size
from training.emoji.icons import SIDE
from training.emoji.networks import FULL, TOY, Scale, build_scheduler, build_unet
from training.emoji.pool import Pool, load_pool, load_sizes

PEAK_RATE, MATRIX_RATE, DECAY = 8e-4, 3e-3, 0.999
SNR_BOUND = 5.0
WARM_UP_STEPS = 3
# Other sizes in pixels, height and width: how many pictures of each, and in what part of the steps
# they are shown. What programs ask for, and what outpainting and a second pass make.
SIZES: dict[Size, tuple[int, float]] = {
    (128, 192): (2048, 0.06),
    (192, 128): (2048, 0.06),
    (192, 192): (2048, 0.06),
    (256, 256): (4096, 0.2),
    (512, 512): (512, 0.06),
}

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

    def error(self, predict: Predict, latents: Tensor, tokens: Tensor, skew: float = 1.0) -> Tensor:
        """Of v as `predict` finds it, from noise, timesteps and contexts drawn here.

        With a `skew` below 1, late timesteps, which have more noise, are drawn more often.
        """
        noise = torch.randn_like(latents)
        parts = torch.rand(len(latents), device=self.device) ** skew
        timesteps = (1000 * parts).long().clamp(max=999)
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


class AllSizes:
    """The objective at the native size, and in some steps at another of SIZES.

    Larger pictures come in smaller batches, so that all steps take about as long. What the
    training counts as samples is the native batch for each step.
    """

    def __init__(self, native: Objective, others: Mapping[Size, Pool]) -> None:
        self.native, self.pools = native, [*others.values()]
        self.areas = [math.prod(size) / SIDE**2 for size in others]
        parts = [SIZES[size][1] for size in others]
        self.parts = torch.tensor([*parts, 1 - sum(parts)])

    def __call__(self, batch: int) -> Tensor:
        chosen = int(torch.multinomial(self.parts, 1))
        if chosen == len(self.pools):
            return self.native(batch)
        count = max(1, round(batch / self.areas[chosen]))
        eager = self.native.unet.forward  # or every size would be compiled
        return self.native.error(eager, *self.pools[chosen].batch(count))


def train(out: Path, scale: Scale, budget: Budget, device: str, compiled: bool) -> None:
    began = time.monotonic()
    pool = load_pool(out, device)
    unet = build(out, scale, device)
    training = training_of(unet, out)
    torch.manual_seed(training.step)
    if compiled:
        compile_unet(unet)
    native = Objective(unet, train_text.load(out, scale, device), pool, device)
    counts = {size: min(count, scale.scenes) for size, (count, _) in SIZES.items()}
    objective = AllSizes(native, load_sizes(out, pool, counts, device))
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
