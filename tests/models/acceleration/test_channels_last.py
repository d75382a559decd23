"""The blocks that a GPU computes in channels-last order, here with torch in place of kernels.

The Triton kernels need a GPU: `python -m bench.gpu --sections kernels` compares them with torch.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdbento.models import device
from sdbento.models.acceleration import channels_last
from sdbento.models.pipeline import Pipeline
from tests.support.images import base64, gradient
from tests.support.loras import ATTENTION, CONV, styled
from tests.support.oracle import engine_pixels, tiny_control, tiny_model

PARITY = 1e-4
BASE: dict[str, Any] = {"prompt": "a cat", "seed": 5, "num_inference_steps": 4}
FAMILIES = ("sd15", "sd21", "sdxl")


class TorchKernels:
    def group_norm(
        self, x: Tensor, norm: nn.GroupNorm, *, silu: bool = False, shift: Tensor | None = None
    ) -> Tensor:
        if shift is not None:
            x = x + shift[:, :, None, None]
        y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return (F.silu(y) if silu else y).contiguous(memory_format=torch.channels_last)

    def add(self, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return (a + b + bias[:, None, None]).contiguous(memory_format=torch.channels_last)


KERNELS = TorchKernels()


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest) -> tuple[Pipeline, Pipeline]:
    """A model, and the same with all its blocks in channels-last order."""
    plain = tiny_model(request.param)
    parts = {name: copy.deepcopy(getattr(plain.pipe, name)) for name in ("unet", "vae")}
    for network in parts.values():
        network.to(memory_format=torch.channels_last)
        for module, forward in channels_last.forwards(network, KERNELS).items():
            module.forward = forward
    pipe = copy.copy(plain.pipe)
    for name, network in parts.items():
        setattr(pipe, name, network)
    return plain, replace(plain, pipe=pipe)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"width": 72, "height": 88},
        {"image": base64(gradient()), "strength": 0.6},
        {"deep_cache_interval": 2},
        {"token_merging_ratio": 0.5},
    ],
    ids=["plain", "odd size", "img2img", "DeepCache", "merged tokens"],
)
def test_the_images_stay_the_same(
    models: tuple[Pipeline, Pipeline], fields: dict[str, Any]
) -> None:
    plain, last = models
    ours, theirs = (engine_pixels(model, **BASE | fields) for model in (last, plain))
    assert np.abs(ours - theirs).max() <= PARITY


def test_controlnets_have_their_effect(models: tuple[Pipeline, Pipeline]) -> None:
    plain, last = models
    kind = str(plain.spec.name).removeprefix("tiny-")
    fields = BASE | {"controlnet": {"type": "canny", "image": base64(gradient())}}
    networks = [tiny_control(kind)]
    ours, theirs = (engine_pixels(model, controlnets=networks, **fields) for model in (last, plain))
    assert np.abs(ours - theirs).max() <= PARITY


@pytest.mark.parametrize("layers", [ATTENTION, CONV], ids=["attention", "convolutions"])
def test_loras_have_their_effect(
    models: tuple[Pipeline, Pipeline], layers: tuple[str, ...], tmp_path: Path
) -> None:
    plain, last = models
    kind = str(plain.spec.name).removeprefix("tiny-")
    options = styled(kind, tmp_path, marks={"unet": layers})
    ours, theirs = (engine_pixels(model, **BASE, **options) for model in (last, plain))
    assert np.abs(ours - theirs).max() <= PARITY
    assert np.abs(ours - engine_pixels(last, **BASE)).max() > 10 * PARITY


@pytest.mark.parametrize("family", FAMILIES)
def test_all_blocks_around_convolutions_are_found(family: str) -> None:
    model = tiny_model(family)
    for network in (model.unet, model.vae):
        found = channels_last.forwards(network, KERNELS)
        resnets = [m for m in network.modules() if type(m).__name__ == "ResnetBlock2D"]
        assert resnets and set(resnets) <= set(found)
    transformers = [m for m in model.unet.modules() if type(m).__name__ == "Transformer2DModel"]
    assert transformers and set(transformers) <= set(channels_last.forwards(model.unet, KERNELS))


def test_a_cpu_computes_as_before() -> None:
    unet = copy.deepcopy(tiny_model("sd15").unet)
    channels_last.install(unet)
    assert not any("forward" in vars(module) for module in unet.modules())


def test_a_gpu_without_triton_computes_as_before_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device.say_once.cache_clear()
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    unet = copy.deepcopy(tiny_model("sd15").unet)
    monkeypatch.setattr(type(unet), "device", torch.device("cuda"))
    channels_last.install(unet)
    assert "Triton is not installed" in caplog.text
    assert not any("forward" in vars(module) for module in unet.modules())
