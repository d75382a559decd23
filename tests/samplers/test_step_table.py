"""Schedulers that no table can represent. For the others see test_compile.py."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from sdbento.errors import UnsupportedSampler
from sdbento.samplers.step_table import read_table
from tests.support.schedulers import SD

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


class Squaring(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
    """A scheduler that is not affine, although nothing in its configuration says so."""

    def step(self, output: torch.Tensor, *args: Any, **options: Any) -> Any:
        return super().step(output + 0.001 * output**2, *args, **options)


class Drifting(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
    def step(self, *args: Any, **options: Any) -> Any:
        latents, *rest = super().step(*args, **options)
        return latents + 1, *rest


class DrawingTwice(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
    def step(self, *args: Any, **options: Any) -> Any:
        latents, *rest = super().step(*args, **options)
        return latents + torch.randn(latents.shape) + torch.randn(latents.shape), *rest


class Hoarding(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
    def step(self, output: torch.Tensor, *args: Any, **options: Any) -> Any:
        self.outputs = [*getattr(self, "outputs", []), output]
        return super().step(output, *args, **options)


@pytest.mark.parametrize(
    ("scheduler_class", "message"),
    [
        (Squaring, "not an affine function"),
        (Drifting, "a constant or several noises"),
        (DrawingTwice, "a constant or several noises"),
        (Hoarding, "more than 10 tensors"),
    ],
)
def test_a_scheduler_that_no_table_can_hold_is_refused(
    scheduler_class: type[Any], message: str
) -> None:
    scheduler = scheduler_class.from_config(SD)
    scheduler.set_timesteps(15)
    with pytest.raises(UnsupportedSampler, match=message):
        read_table(scheduler)
