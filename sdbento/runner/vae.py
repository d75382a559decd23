"""Images to latents and back, as the stock pipelines do it. Runs on the engine's thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sdbento.models.device import upload
from sdbento.models.pipeline import Pipeline


def draw_noise(
    shape: Sequence[int], generator: torch.Generator, pipeline: Pipeline
) -> torch.Tensor:
    """Noise as diffusers' randn_tensor draws it with a CPU generator: on the CPU, then moved."""
    noise = torch.randn(tuple(shape), generator=generator, dtype=pipeline.dtype)
    return upload(noise, pipeline.dtype, pipeline.device).float()


@dataclass(frozen=True, eq=False)
class Posterior:
    """What the encoder makes of an image: a normal distribution of latents, [1, C, h, w]."""

    mean: torch.Tensor
    std: torch.Tensor

    def sample(self, generator: torch.Generator, pipeline: Pipeline) -> torch.Tensor:
        """Scaled latents, float32."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=pipeline.vae_dtype)
        latents = self.mean + self.std * upload(noise, noise.dtype, pipeline.device)
        return _scale(latents.float(), pipeline)


def encode(pixels: torch.Tensor, pipeline: Pipeline) -> Posterior:
    """The posterior of an image [1, 3, H, W] on [-1, 1]."""
    pixels = upload(pixels, pipeline.vae_dtype, pipeline.device)
    posterior = pipeline.vae.encode(pixels).latent_dist
    return Posterior(posterior.mean, posterior.std)


def decode(latents: torch.Tensor, pipeline: Pipeline) -> torch.Tensor:
    """Images [B, H, W, 3] on [0, 1], float32, of scaled latents [B, C, h, w].

    What overflows is NaN.
    """
    scaled = _unscale(latents, pipeline).to(decoder_dtype(pipeline))
    decoded: torch.Tensor = pipeline.vae.decode(scaled, return_dict=False)[0].float()
    decoded = decoded + 0 * decoded  # makes NaN of infinity, which `clamp` would make white
    return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def decoder_dtype(pipeline: Pipeline) -> torch.dtype:
    """What `decode` computes in: the VAE's own precision, or float32 after `upcast_decoder`."""
    dtype: torch.dtype = next(pipeline.vae.decoder.parameters()).dtype
    return dtype


@torch.inference_mode(False)
@torch.no_grad()
def upcast_decoder(pipeline: Pipeline) -> int:
    """Make `decode` compute in float32 from now on; returns the bytes that this takes for good.

    The encoder keeps its precision, in which it also draws noise: what it makes stays the same. If
    the device runs out of memory, nothing has changed.
    """
    parts = [pipeline.vae.decoder, pipeline.vae.post_quant_conv]
    weights: list[torch.Tensor] = [
        weight for part in parts if part is not None for weight in part.parameters()
    ]
    upcast = [weight.data.float() for weight in weights]
    more = sum(wide.nbytes - weight.nbytes for wide, weight in zip(upcast, weights, strict=True))
    for weight, wide in zip(weights, upcast, strict=True):
        weight.data = wide
    pipeline.nbytes += more
    return more


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels on [0, 1] as 8-bit values, rounded where the pixels are."""
    return (pixels * 255).round().to(torch.uint8)


def _scale(latents: torch.Tensor, pipeline: Pipeline) -> torch.Tensor:
    """To the scale that the UNet was trained at."""
    mean, std = _statistics(latents, pipeline)
    return (latents - mean) * float(pipeline.vae.config.scaling_factor) / std


def _unscale(latents: torch.Tensor, pipeline: Pipeline) -> torch.Tensor:
    mean, std = _statistics(latents, pipeline)
    return latents * std / float(pipeline.vae.config.scaling_factor) + mean


def _statistics(latents: torch.Tensor, pipeline: Pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of a VAE's latents, a channel each, where its configuration has them."""
    config = pipeline.vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [0.0], [1.0]
    mean, std = (upload(values, latents.dtype, latents.device) for values in (mean, std))
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
