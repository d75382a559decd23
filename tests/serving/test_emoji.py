"""The embedded model `emoji`, whose noise schedule ends in pure noise."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from sdbento.catalog.lookup import Catalog
from sdbento.environment import load_settings
from sdbento.models.pipeline import Pipeline
from sdbento.models.weights import load
from tests.serving.test_parity import PARITY, SAMPLERS
from tests.support.oracle import engine_pixels, stock_pixels

BLUE, RED = (45, 90, 215), (215, 45, 45)


@cache
def emoji() -> Pipeline:
    settings = load_settings(sd_model="emoji", device="cpu", precision="fp32")
    loaded = load(Catalog(settings).resolve("emoji"), settings)
    assert isinstance(loaded, Pipeline)
    return loaded


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_makes_the_stock_pipelines_image(sampler: str) -> None:
    fields: dict[str, Any] = {"prompt": "a cat face", "num_inference_steps": 7, "seed": 3}
    fields["scheduler"] = sampler
    ours, theirs = (make(emoji(), **fields) for make in (engine_pixels, stock_pixels))
    assert theirs.std() > 0.01, "a flat image proves nothing"
    assert np.abs(ours - theirs).max() <= PARITY


def test_it_draws_what_one_names() -> None:
    fields: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0, "seed": 1}
    image = engine_pixels(emoji(), prompt="a red apple on a blue background", **fields) * 255
    assert np.abs(np.median(image[:8], axis=(0, 1)) - BLUE).max() < 40
    assert np.abs(np.median(image[56:88, 48:80], axis=(0, 1)) - RED).max() < 60
