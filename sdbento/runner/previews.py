"""Cheap previews: a step's estimate of the final latents, turned into RGB without the VAE.

A model may have a tiny decoder of its own. The others have the 4 x 3 matrix of their family, and
one pixel of the preview stands for 8 x 8 pixels of the image. Previews are enlarged to be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from diffusers import DDPMScheduler
from PIL import Image

from sdbento.models.device import upload
from sdbento.models.pipeline import Pipeline
from sdbento.runner.vae import to_bytes

PREVIEW_SIDE = 256  # pixels of the longer side


def preview_pixels(
    pipeline: Pipeline,
    model_input: torch.Tensor,
    output: torch.Tensor,
    timesteps: Sequence[float],
) -> torch.Tensor:
    """[B, h, w, 3], 8-bit values, of rows [B, C, h, w]; `model_input` is the scaled latents."""
    estimate = denoised(pipeline, model_input, output, timesteps)
    return to_bytes((_rgb(pipeline, estimate) / 2 + 0.5).clamp(0, 1))


def _rgb(pipeline: Pipeline, latents: torch.Tensor) -> torch.Tensor:
    """[B, h, w, 3] on [-1, 1], of scaled latents [B, C, h, w]."""
    if (decoder := pipeline.preview_decoder) is not None:
        decoded: torch.Tensor = decoder.decode(latents.to(decoder.dtype)).sample
        return decoded.movedim(1, -1)
    factors = upload(pipeline.spec.latent_rgb, latents.dtype, latents.device)  # [C + 1, 3]
    return torch.einsum("bchw,cr->bhwr", latents, factors[:-1]) + factors[-1]


def preview_image(pixels: torch.Tensor) -> Image.Image:
    """One preview [h, w, 3], enlarged."""
    image = Image.fromarray(pixels.numpy())
    factor = max(1, PREVIEW_SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def denoised(
    pipeline: Pipeline,
    model_input: torch.Tensor,
    output: torch.Tensor,
    timesteps: Sequence[float],
) -> torch.Tensor:
    """The x0 that the model's output implies (equation 12 of Song et al. 2021, DDIM).

    Scaled model inputs have variance 1 at every timestep whatever the sampler, so one formula per
    prediction type serves all of them.
    """
    config = pipeline.scheduler_config
    kept = _signal_levels(
        config.get("beta_schedule", "scaled_linear"),
        config.get("beta_start", 0.00085),
        config.get("beta_end", 0.012),
        config.get("rescale_betas_zero_snr", False),
    )
    levels = [float(kept[round(min(max(t, 0.0), len(kept) - 1.0))]) for t in timesteps]
    signal = upload(levels, output.dtype, output.device)[:, None, None, None]
    if config.get("prediction_type") == "v_prediction":
        return signal.sqrt() * model_input - (1 - signal).sqrt() * output
    if config.get("prediction_type") == "sample":
        return output
    signal = signal.clamp(min=1e-4)  # pure noise tells nothing of the latents
    return (model_input - (1 - signal).sqrt() * output) / signal.sqrt()


@lru_cache(maxsize=16)
def _signal_levels(
    beta_schedule: str, beta_start: float, beta_end: float, zero_snr: bool
) -> torch.Tensor:
    scheduler = DDPMScheduler(
        beta_schedule=beta_schedule,
        beta_start=beta_start,
        beta_end=beta_end,
        rescale_betas_zero_snr=zero_snr,
    )
    kept: torch.Tensor = scheduler.alphas_cumprod
    return kept
