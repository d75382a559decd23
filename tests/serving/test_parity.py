"""Invariants 1 and 2: every image is the stock pipeline's, whatever other requests run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdbento.models.pipeline import Pipeline
from sdbento.runner.graphs import Graphs
from sdbento.samplers.names import list_samplers
from tests.support.graphs import fake_graphs
from tests.support.oracle import (
    engine_pixels,
    run_together,
    stock_pixels,
    tiny_model,
    trajectories_of,
)

FAMILIES = ["sd15", "sd21", "sdxl"]
SAMPLERS = [sampler.name for sampler in list_samplers() if "EDM" not in sampler.name]
PARITY = 1e-3  # of the decoded image on [0, 1]
ONE_LEVEL = 1.01 / 255


@cache
def model(family: str) -> Pipeline:
    return tiny_model(family)


def difference(family: str, **fields: Any) -> float:
    ours, theirs = (make(model(family), **fields) for make in (engine_pixels, stock_pixels))
    assert theirs.std() > 0.01, "a flat image proves nothing"
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_makes_the_stock_pipelines_image(family: str, sampler: str) -> None:
    fields = {"prompt": "a cat", "scheduler": sampler, "num_inference_steps": 7, "seed": 3}
    assert difference(family, **fields) <= PARITY


VARIANTS: list[dict[str, Any]] = [
    {"negative_prompt": "ugly"},
    {"negative_prompt": ""},
    {"guidance_scale": 1.0},
    {"guidance_scale": 0.0},
    {"guidance_scale": 12.0, "guidance_rescale": 0.7},
    {"width": 72, "height": 104},
    {"scheduler": "DDIM", "eta": 0.8},
    {"scheduler": "Euler", "sigmas": "karras", "timestep_spacing": "trailing"},
    {"scheduler": "DPM++ 2M SDE Karras", "num_inference_steps": 11},
    {"num_inference_steps": 1, "scheduler": "Euler a"},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_parameter_means_what_it_means_in_the_stock_pipeline(
    family: str, variant: dict[str, Any]
) -> None:
    fields = {"prompt": "a dog", "num_inference_steps": 5, "seed": 11, **variant}
    assert difference(family, **fields) <= PARITY


def test_sdxl_conditions_on_sizes_and_crops_as_the_stock_pipeline() -> None:
    sizes: dict[str, Any] = {
        "original_size": (512, 768),
        "crops_coords_top_left": (16, 32),
        "target_size": (256, 256),
        "negative_original_size": (128, 128),
        "negative_crops_coords_top_left": (8, 0),
        "negative_target_size": (1024, 1024),
    }
    fields: dict[str, Any] = {"prompt": "a fox", "num_inference_steps": 4, "seed": 5}
    assert difference("sdxl", **fields, **sizes) <= PARITY
    plain, sized = (engine_pixels(model("sdxl"), **fields, **extra) for extra in ({}, sizes))
    assert np.abs(plain - sized).max() > 10 * PARITY


def test_images_of_one_request_have_the_seeds_that_follow() -> None:
    fields: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 4}
    [several] = run_together([trajectories_of(model("sd15"), seed=5, num_images=3, **fields)])
    for i, pixels in enumerate(several):
        assert np.abs(pixels - stock_pixels(model("sd15"), seed=5 + i, **fields)).max() <= PARITY


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "prompt": draw(st.sampled_from(["a cat", "a dog", ""])),
        "negative_prompt": draw(st.sampled_from([None, "", "ugly"])),
        "scheduler": draw(st.sampled_from(SAMPLERS)),
        "num_inference_steps": draw(st.integers(4, 9)),
        "guidance_scale": draw(st.sampled_from([1.0, 2.5, 9.0])),
        "guidance_rescale": draw(st.sampled_from([0.0, 0.5])),
        "width": draw(st.sampled_from([64, 72])),
        "deep_cache_interval": draw(st.sampled_from([1, 1, 3])),
        "token_merging_ratio": draw(st.sampled_from([0.0, 0.0, 0.5])),
        "seed": draw(st.integers(0, 2**32)),
    }


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(FAMILIES),
    st.lists(st.tuples(requests(), st.integers(0, 20)), min_size=2, max_size=6),
    st.integers(1, 6),
    st.sampled_from([None, fake_graphs]),
)
def test_an_image_does_not_depend_on_other_requests_or_its_arrival(
    family: str,
    visits: list[tuple[dict[str, Any], int]],
    max_images: int,
    graphs: Callable[[], Graphs] | None,
) -> None:
    groups = [trajectories_of(model(family), **fields) for fields, _ in visits]
    arrivals = [arrival for _, arrival in visits]
    together = run_together(groups, max_images, arrivals, graphs and graphs())
    for (fields, _), pixels in zip(visits, together, strict=True):
        alone = engine_pixels(model(family), **fields)
        assert np.abs(alone - pixels[0]).max() <= ONE_LEVEL, fields
