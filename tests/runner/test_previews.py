"""Previews: the final latents that a step's output implies, and their colours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw
from torch.nn import functional as F

from sdbento.catalog.specs import ModelSpec, catalogued
from sdbento.environment import load_settings
from sdbento.models.pipeline import Pipeline
from sdbento.models.weights import load
from sdbento.runner.previews import denoised, preview_pixels

TIMESTEPS = (999, 500, 1)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_final_latents_are_found_from_v(zero_snr: bool) -> None:
    config: dict[str, Any] = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": zero_snr,
    }
    scheduler = DDIMScheduler(**config)
    pipeline = cast(Pipeline, SimpleNamespace(scheduler_config=config))
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, len(TIMESTEPS), 4, 16, 16, generator=rng)
    timesteps = torch.tensor(TIMESTEPS)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    v = scheduler.get_velocity(latents, noise, timesteps)
    found = denoised(pipeline, noisy, v, TIMESTEPS)
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)


BUNDLED = [spec for spec in catalogued() if spec.preview_decoder]


@pytest.mark.parametrize("spec", BUNDLED, ids=str)
@torch.no_grad()
def test_previews_of_embedded_models_have_the_colours_of_the_image(spec: ModelSpec) -> None:
    pipeline = load(spec, load_settings(device="cpu", precision="fp32"))
    assert isinstance(pipeline, Pipeline)
    drawing = Image.new("RGB", (128, 128), (45, 90, 215))
    ImageDraw.Draw(drawing).ellipse((28, 28, 100, 100), fill=(215, 45, 45))
    pixels = torch.from_numpy(np.array(drawing)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    scheduler = DDIMScheduler.from_config(pipeline.scheduler_config)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([500])
    noisy = scheduler.add_noise(latents, noise, timestep)
    of_v = scheduler.config["prediction_type"] == "v_prediction"
    output = scheduler.get_velocity(latents, noise, timestep) if of_v else noise
    (preview,) = preview_pixels(pipeline, noisy, output, [500.0])
    assert preview.shape == (64, 64, 3)
    image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    wanted = (F.avg_pool2d(image[0], 2).permute(1, 2, 0) + 1) * 127.5
    assert (preview - wanted).abs().mean() < 8
