"""DeepCache and token merging: as a stock pipeline that does the same, and the same in any company.

The reference is the stock pipeline around a UNet whose calls are whole or shallow by their number.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sdbento.engine.trajectory import Trajectory
from sdbento.environment import load_settings
from sdbento.models.pipeline import Pipeline
from sdbento.runner.unet.deep_cache import kept_features, shallow
from sdbento.runner.unet.token_merging import merged_tokens
from tests.support.images import data_uri, gradient, half_mask
from tests.support.loras import everything, make_lora, save_peft
from tests.support.oracle import (
    engine_pixels,
    run_together,
    settled,
    stock_pixels,
    tiny_model,
    trajectories_of,
)
from tests.support.stock import stock_pipeline, stock_run

FAMILIES = ["sd15", "sd21", "sdxl"]
PARITY = 1e-3  # of the decoded image on [0, 1]
ONE_LEVEL = 1.01 / 255
IMAGE, MASK = data_uri(gradient()), data_uri(half_mask())
BASE: dict[str, Any] = {
    "prompt": "a cat",
    "negative_prompt": "ugly",
    "num_inference_steps": 7,
    "seed": 7,
}
INPAINT: dict[str, Any] = {**BASE, "image": IMAGE, "mask_image": MASK, "strength": 0.9}
OPTIONS = ("deep_cache_interval", "token_merging_ratio")
LESS: list[dict[str, Any]] = [
    {"deep_cache_interval": 2},
    {"deep_cache_interval": 3, "scheduler": "Heun"},
    {"deep_cache_interval": 10, "scheduler": "DPM++ 2M SDE"},
    {"deep_cache_interval": 3, "guidance_scale": 1.0},
    {"token_merging_ratio": 0.5},
    {"deep_cache_interval": 3, "token_merging_ratio": 0.25, "scheduler": "Euler a"},
]


@cache
def model(kind: str) -> Pipeline:
    return tiny_model(kind)


def stock_with_less(kind: str, fields: dict[str, Any]) -> NDArray[np.float32]:
    """The stock pipeline's image, with every call of its UNet replaced."""
    request, images = settled(model(kind), **fields)
    unet = model(kind).unet
    features: Any = None
    num_calls = 0

    def forward(sample: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal features, num_calls
        num_calls += 1
        with merged_tokens(unet, request.token_merging_ratio, *sample.shape[-2:]):
            if (num_calls - 1) % request.deep_cache_interval:
                return shallow(unet, features)(sample, *args, **kwargs)
            with kept_features(unet) as kept:
                output = unet(sample, *args, **kwargs)
            [features] = kept
            return output

    pipe = stock_pipeline(model(kind), image=images.image is not None, mask=images.mask is not None)
    pipe.unet = copy.copy(unet)
    pipe.unet.forward = forward
    made: NDArray[np.float32] = stock_run(
        model(kind), request, image=images.image, mask=images.mask, pipe=pipe
    )
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("less", LESS, ids=str)
def test_the_image_is_that_of_a_stock_pipeline_that_does_as_little(
    family: str, less: dict[str, Any]
) -> None:
    fields = {**BASE, **less}
    ours = engine_pixels(model(family), **fields)
    assert np.abs(ours - stock_with_less(family, fields)).max() <= PARITY
    whole = {name: value for name, value in fields.items() if name not in OPTIONS}
    assert np.abs(ours - stock_pixels(model(family), **whole)).max() > 5 * PARITY


@pytest.mark.parametrize("kind", ["sd15", "sd15-inpaint", "sdxl-inpaint"])
def test_inpainting_does_as_little(kind: str) -> None:
    fields = {**INPAINT, "deep_cache_interval": 2, "token_merging_ratio": 0.5}
    ours = engine_pixels(model(kind), **fields)
    assert np.abs(ours - stock_with_less(kind, fields)).max() <= PARITY


@pytest.mark.parametrize(
    ("fields", "whole_calls"),
    [
        ({}, 8),
        ({"deep_cache_interval": 3}, 3),  # steps 0, 3, 6
        ({"deep_cache_interval": 3, "guidance_start": 0.25, "guidance_end": 0.75}, 4),  # and 2
        ({"deep_cache_interval": 8, "hires": {"scale": 1.5, "strength": 0.5}}, 2),
    ],
)
def test_the_deep_blocks_are_computed_in_whole_steps_only(
    fields: dict[str, Any], whole_calls: int
) -> None:
    eight_steps = {**BASE, "num_inference_steps": 8, "scheduler": "DDIM"}
    num_calls = 0

    def count(*_: object) -> None:
        nonlocal num_calls
        num_calls += 1

    hook = model("sd15").unet.mid_block.register_forward_hook(count)
    try:
        engine_pixels(model("sd15"), **eight_steps | fields)
    finally:
        hook.remove()
    assert num_calls == whole_calls


KINDS: list[dict[str, Any]] = [
    BASE,
    {**BASE, "deep_cache_interval": 2, "scheduler": "Euler a"},
    {**BASE, "deep_cache_interval": 3, "guidance_start": 0.2, "guidance_end": 0.7},
    {**BASE, "deep_cache_interval": 3, "prompt": "a cat <lora:a-FAMILY:0.7>", "guidance_scale": 1},
    {**BASE, "deep_cache_interval": 2, "prompt": "a [cat:dog:0.5]", "num_images": 2},
    {**INPAINT, "deep_cache_interval": 3, "scheduler": "Heun"},
    {**BASE, "deep_cache_interval": 2, "hires": {"scale": 1.5, "strength": 0.5}},
    {**BASE, "token_merging_ratio": 0.5},
    {**BASE, "token_merging_ratio": 0.5, "prompt": "a dog <lora:a-FAMILY:0.7>"},
    {**BASE, "token_merging_ratio": 0.5, "deep_cache_interval": 2, "scheduler": "DPM++ 2M SDE"},
]


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for family in FAMILIES:
        layers = make_lora(family, 1, marks=everything(family))
        save_peft(family, layers, folder / f"a-{family}.safetensors")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_images", [3, 16])
def test_an_image_is_the_same_alone_and_in_any_company(
    family: str, max_images: int, lora_folder: Path
) -> None:
    def jobs() -> list[list[Trajectory]]:
        return [
            trajectories_of(
                model(family),
                settings=load_settings(lora_dir=lora_folder),
                **{**fields, "prompt": fields["prompt"].replace("FAMILY", family)},
            )
            for fields in KINDS
        ]

    alone = [run_together([job])[0] for job in jobs()]
    together = run_together(jobs(), max_images, arrivals=[i // 2 for i in range(len(KINDS))])
    for one, other in zip(alone, together, strict=True):
        assert np.abs(np.stack(one) - np.stack(other)).max() <= ONE_LEVEL


def test_the_refiner_does_as_little_too() -> None:
    def job(**fields: Any) -> list[Trajectory]:
        refiner = {"refiner": {"switch_at": 0.5}, **fields}
        return trajectories_of(model("sdxl"), refined_by=model("sdxl-refiner"), **BASE, **refiner)

    less = {"deep_cache_interval": 2, "token_merging_ratio": 0.25}
    [[alone]], [[whole]] = run_together([job(**less)]), run_together([job()])
    together = run_together([job(), job(**less), job(deep_cache_interval=3)])
    assert np.abs(alone - together[1][0]).max() <= ONE_LEVEL
    assert np.abs(whole - together[0][0]).max() <= ONE_LEVEL
    assert np.abs(alone - whole).max() > 5 * PARITY
