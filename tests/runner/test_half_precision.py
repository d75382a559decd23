"""In bf16 the engine rounds elsewhere than the stock pipeline does, but it draws the same noise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from sdbento.models.pipeline import Pipeline
from sdbento.samplers.names import list_samplers
from tests.support.oracle import engine_pixels, stock_pixels, tiny_model

STOCHASTIC = [sampler.name for sampler in list_samplers() if sampler.stochastic]


class Drawn(TorchFunctionMode):
    """Keeps the noise that is drawn inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.noise: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.randn and made.shape == (1, 4, 8, 8):  # latents, and not a table's samples
            self.noise.append(made)
        return made


@pytest.fixture(scope="module")
def half() -> Pipeline:
    model = tiny_model("sd15")
    pipe = copy.deepcopy(model.pipe)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.to(torch.bfloat16)
    return replace(model, pipe=pipe, dtype=torch.bfloat16, vae_dtype=torch.bfloat16)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_a_stochastic_sampler_draws_the_noise_of_the_stock_pipeline(
    sampler: str, half: Pipeline
) -> None:
    fields: dict[str, Any] = {"prompt": "a cat", "seed": 5, "num_inference_steps": 4}
    fields["scheduler"] = sampler
    with Drawn() as ours:
        engine_pixels(half, **fields)
    with Drawn() as theirs:
        stock_pixels(half, **fields)
    assert len(ours.noise) == len(theirs.noise) > 1
    for drawn, expected in zip(ours.noise, theirs.noise, strict=True):
        assert drawn.dtype is expected.dtype
        assert torch.equal(drawn.flatten(), expected.flatten())
