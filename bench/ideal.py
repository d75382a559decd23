"""The time that perfect packing would need: the cost curves t(rows) of UNet and VAE, measured here.

Every denoising row at the least seconds a row of any batch size, every image through the
VAE, and nothing else: no HTTP, no scheduling, no sampler, never a batch that is not full.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from sdbento.engine.inputs import FromNoise
from sdbento.models.pipeline import Pipeline
from sdbento.request.passes import compile_sampler
from sdbento.request.schema import GenerateRequest
from sdbento.request.settle import settle

ROWS = (1, 2, 4, 6, 8, 12, 16)
REPEATS = 7


@dataclass(frozen=True)
class Costs:
    """Median seconds of a UNet call by rows, and of the VAE for one image, at one image side."""

    unet: dict[int, float]
    vae: float

    @property
    def best_row(self) -> float:
        """Seconds a row at the best batch size."""
        return min(seconds / rows for rows, seconds in self.unet.items())


def _median_seconds(call: Callable[[], Any]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return median(times)


def _unet_seconds(pipeline: Pipeline, text: torch.Tensor, rows: int, latent: int) -> float:
    latents = torch.randn(rows, 4, latent, latent)
    timesteps = torch.full((rows,), 500.0)
    embeds = text.expand(rows, -1, -1)
    return _median_seconds(lambda: pipeline.unet(latents, timesteps, embeds))


@torch.inference_mode()
def measure(pipeline: Pipeline, side: int) -> Costs:
    latent = side // 8
    text = torch.randn(1, 77, pipeline.unet.config.cross_attention_dim)
    unet = {rows: _unet_seconds(pipeline, text, rows, latent) for rows in ROWS}
    one = torch.randn(1, 4, latent, latent)
    vae = min(
        _median_seconds(lambda: pipeline.vae.decode(one)),
        _median_seconds(lambda: pipeline.vae.decode(one.expand(4, -1, -1, -1))) / 4,
    )
    return Costs(unet, vae)


def ideal_seconds(
    pipeline: Pipeline, trace: Sequence[dict[str, Any]], costs: dict[int, Costs]
) -> float:
    """Seconds that `trace` would take under perfect packing."""
    total = 0.0
    for fields in trace:
        request = GenerateRequest(**fields)
        settled, _ = settle(request, pipeline.spec, sent=None, max_pixels=4096**2)
        num_calls = compile_sampler(settled, pipeline, FromNoise()).num_steps
        rows = 2 if fields["guidance_scale"] > 1 else 1
        side = costs[fields["width"]]
        total += num_calls * rows * side.best_row + side.vae
    return total
