"""Which files of a repository are needed."""

from __future__ import annotations

import pytest

from sdbento.catalog.layout import controlnet_layout, model_layout
from sdbento.errors import UnsupportedModel

INDEX = {"unet": ["diffusers", "UNet2DConditionModel"], "tokenizer": ["transformers", "CLIP"]}
FULL, HALF = (
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
)
SHARDS = [
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
]
CLUTTER = [
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/model.onnx",
    "sd_xl_base_1.0.safetensors",
    "safety_checker/model.safetensors",
]


@pytest.mark.parametrize(
    ("files", "half", "chosen"),
    [
        ([FULL, HALF], True, [HALF]),
        ([FULL, HALF], False, [FULL]),
        ([FULL], True, [FULL]),
        ([HALF], False, [HALF]),
        ([FULL, *SHARDS], True, SHARDS),
        (["unet/model.safetensors"], True, ["unet/model.safetensors"]),
    ],
)
def test_one_variant_of_the_weights_is_needed(
    files: list[str], half: bool, chosen: list[str]
) -> None:
    assert model_layout("m", INDEX).weights([*files, *CLUTTER], half) == chosen


def test_pickled_weights_alone_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="pickled weights only"):
        model_layout("m", INDEX).weights(CLUTTER[:1], half=False)


# ControlNets, whose weights lie beside their configuration

CONTROL_FULL, CONTROL_HALF = (file.removeprefix("unet/") for file in (FULL, HALF))


@pytest.mark.parametrize(
    ("files", "half", "chosen"),
    [
        ([CONTROL_FULL, CONTROL_HALF], True, [CONTROL_HALF]),
        ([CONTROL_FULL, CONTROL_HALF], False, [CONTROL_FULL]),
        ([CONTROL_FULL, "diffusion_pytorch_model.bin", "model.safetensors"], True, [CONTROL_FULL]),
        ([CONTROL_FULL, "diffusion_pytorch_model_V2.safetensors", FULL], False, [CONTROL_FULL]),
    ],
)
def test_one_variant_of_a_controlnets_weights_is_needed(
    files: list[str], half: bool, chosen: list[str]
) -> None:
    assert controlnet_layout("c").weights(files, half) == chosen


def test_pickled_weights_alone_of_a_controlnet_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="ControlNet c is not supported: it has pickled"):
        controlnet_layout("c").weights(["diffusion_pytorch_model.bin"], half=False)
