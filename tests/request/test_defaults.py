"""Which defaults of the stock pipelines are not ours: docs/requests.md names the same."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers

from sdbento.request.schema import ControlNetInput
from sdbento.request.settle import MASKED_STRENGTH, STRENGTH

SCALE = ControlNetInput.model_fields["conditioning_scale"].default
FAMILIES = ("StableDiffusion", "StableDiffusionXL")
TASKS = ("Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")


def differing(pipeline: type) -> dict[str, Any]:
    """Its defaults that are not ours."""
    parameters = inspect.signature(pipeline.__call__).parameters
    strength = MASKED_STRENGTH if "mask_image" in parameters else STRENGTH
    ours = {"strength": strength, "controlnet_conditioning_scale": SCALE}
    stock = {name: parameters[name].default for name in ours if name in parameters}
    return {name: default for name, default in stock.items() if default != ours[name]}


def test_the_defaults_that_differ_from_the_stock_pipelines_are_known() -> None:
    found = {
        f"{family}{task}": differing(getattr(diffusers, f"{family}{task}Pipeline"))
        for family in FAMILIES
        for task in TASKS
    }
    assert {name: differs for name, differs in found.items() if differs} == {
        "StableDiffusionControlNetImg2Img": {"controlnet_conditioning_scale": 0.8},
        "StableDiffusionControlNetInpaint": {"controlnet_conditioning_scale": 0.5},
        "StableDiffusionXLImg2Img": {"strength": 0.3},
        "StableDiffusionXLInpaint": {"strength": 0.9999},
        "StableDiffusionXLControlNetImg2Img": {"controlnet_conditioning_scale": 0.8},
        "StableDiffusionXLControlNetInpaint": {"strength": 0.9999},
    }
