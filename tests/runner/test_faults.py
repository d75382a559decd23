"""Faults in every stage of the real runner: one image fails, the others are what they are alone."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdbento.engine.loop import Engine
from sdbento.engine.planner import Planner
from sdbento.engine.trajectory import Trajectory, image_of
from sdbento.errors import GenerationFailed, OutOfMemory, SDBentoError
from sdbento.runner import torch_runner
from sdbento.runner.torch_runner import TorchRunner
from tests.support.images import data_uri, gradient, half_mask
from tests.support.oracle import tiny_model, trajectories_of

BASE: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 3}
REPAINTED = {"image": data_uri(gradient()), "mask_image": data_uri(half_mask()), "strength": 0.9}
ASKED: list[dict[str, Any]] = [
    {**BASE, "seed": 0, "scheduler": "Euler a"},
    {**BASE, "seed": 1, "scheduler": "DPM++ 2M", "guidance_scale": 1.0},
    {**BASE, "seed": 2, "scheduler": "DPM++ 2M SDE"},
    {**BASE, "seed": 3, "scheduler": "Euler a", **REPAINTED},
]
BAD = 2  # the image at fault
SOON = 100.0


class RustPanic(BaseException):
    """As libraries in Rust raise it: no Exception."""


Make = Callable[[], BaseException]
Patch = Callable[[pytest.MonkeyPatch, Callable[[Sequence[Trajectory]], None]], None]


def around(name: str, members: Callable[..., Sequence[Trajectory]]) -> Patch:
    """Before a function of the runner is called, `fail` may raise, knowing whose images it is
    for."""

    def patch(patched: pytest.MonkeyPatch, fail: Callable[[Sequence[Trajectory]], None]) -> None:
        function = getattr(torch_runner, name)

        def call(*args: Any) -> Any:
            fail(members(*args))
            return function(*args)

        patched.setattr(torch_runner, name, call)

    return patch


PLACES: dict[str, Patch] = {
    "prepare": around("first_state", lambda trajectory, _: [trajectory]),
    "step": around("call_unet", lambda _, owners, *rest: owners),
    "noise": around("_draw", lambda trajectory: [trajectory]),
    "mask": around("_put_back_unmasked", lambda trajectories, _: trajectories),
    "decode": around("_decode", lambda trajectories: trajectories),
}


def ended(trajectories: list[Trajectory], max_images: int = 8) -> list[Any]:
    """The image of each, or why there is none. They are all there when the engine starts."""
    engine = Engine(TorchRunner(), Planner(max_images))
    handles = [engine.submit([one], time.monotonic() + SOON) for one in trajectories]
    engine.start()
    try:
        errors: Any = [handle.done.exception(SOON) for handle in handles]
    finally:
        engine.close(0.0)
    assert not engine.alive
    return [
        np.asarray(image_of(one), np.float32) if error is None else error
        for one, error in zip(trajectories, errors, strict=True)
    ]


def requested(asked: Sequence[dict[str, Any]] = ASKED, model: Any = None) -> list[Trajectory]:
    return [trajectories_of(model or tiny_model("sd15"), **fields)[0] for fields in asked]


@cache
def alone() -> list[Any]:
    return [ended(requested([fields]))[0] for fields in ASKED]


def assert_unchanged(made: Any, image: int) -> None:
    assert isinstance(made, np.ndarray), made
    assert np.abs(made - alone()[image]).max() <= 1


@pytest.mark.parametrize(
    "error",
    [ValueError("a bug"), MemoryError(), RustPanic("a bug")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", PLACES)
def test_an_image_at_fault_fails_alone(
    place: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone()

    def fail(trajectories: Sequence[Trajectory]) -> None:
        if any(trajectory.seed == BAD for trajectory in trajectories):
            raise error

    PLACES[place](monkeypatch, fail)
    made = ended(requested())
    assert len(made) == len(expected)
    assert isinstance(made[BAD], OutOfMemory if isinstance(error, MemoryError) else SDBentoError)
    for image in {0, 1, 3}:
        assert_unchanged(made[image], image)


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("place", ["step", "decode"])
def test_a_device_that_is_too_small_for_all_makes_the_same_images(
    place: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone()

    def fail(trajectories: Sequence[Trajectory]) -> None:
        if len(set(trajectories)) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    PLACES[place](monkeypatch, fail)
    for image, made in enumerate(ended(requested())):
        assert_unchanged(made, image)


@pytest.mark.parametrize("place", PLACES)
def test_an_image_that_finds_memory_at_its_second_try_is_the_same(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise that was drawn for the first try is not drawn again."""
    alone()
    failures = [torch.OutOfMemoryError("CUDA out of memory")]

    def fail(trajectories: Sequence[Trajectory]) -> None:
        if failures and any(trajectory.seed == BAD for trajectory in trajectories):
            raise failures.pop()

    PLACES[place](monkeypatch, fail)
    for image, made in enumerate(ended(requested())):
        assert_unchanged(made, image)


def test_pixels_that_cannot_become_an_image_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, fromarray, calls = alone(), Image.fromarray, []

    def sometimes(pixels: Any) -> Image.Image:
        calls.append(pixels)
        if len(calls) == 2:
            raise MemoryError
        return fromarray(pixels)

    monkeypatch.setattr(Image, "fromarray", sometimes)
    made = ended(requested())
    failed = [image for image in range(len(expected)) if isinstance(made[image], SDBentoError)]
    assert len(failed) == 1
    for image in {*range(len(expected))} - {*failed}:
        assert_unchanged(made[image], image)


def test_a_preview_that_fails_costs_no_image(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone()
    monkeypatch.setattr(torch_runner, "preview_image", lambda _: 1 / 0)
    trajectories = requested()
    trajectories[0].preview_every = 1
    for image, made in enumerate(ended(trajectories)):
        assert_unchanged(made, image)
    assert "a preview cannot be made" in caplog.text


# Numbers that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_latents_that_overflow_fail_their_own_image(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone()
    draw = torch_runner._draw

    def overflow(trajectory: Trajectory) -> torch.Tensor:
        return draw(trajectory) * (value if trajectory.seed == BAD else 1.0)

    monkeypatch.setattr(torch_runner, "_draw", overflow)
    made = ended(requested())
    assert isinstance(made[BAD], GenerationFailed)
    assert "its denoising has overflowed; try a lower guidance_scale" in made[BAD].message
    for image in {0, 1, 3}:
        assert_unchanged(made[image], image)


def with_vae(dtype: torch.dtype, factor: float) -> Any:
    """A model whose VAE computes in `dtype`, with activations `factor` times as large."""
    model = tiny_model("sd15")
    pipe = copy.deepcopy(model.pipe)
    pipe.vae.to(dtype)
    pipe.vae.decoder.conv_in.weight.mul_(factor)
    return replace(model, pipe=pipe, vae_dtype=dtype)


def test_a_vae_that_overflows_decodes_again_in_fp32(caplog: pytest.LogCaptureFixture) -> None:
    half, single = with_vae(torch.float16, 3e4), with_vae(torch.float32, 3e4)
    [made] = ended(requested(ASKED[:1], half))
    [expected] = ended(requested(ASKED[:1], single))
    assert isinstance(made, np.ndarray) and isinstance(expected, np.ndarray)
    assert np.abs(made - expected).max() <= 1
    assert np.ptp(expected) > 0
    assert "the VAE overflows in torch.float16" in caplog.text
    assert half.vae.dtype is torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_vae_that_overflows_even_in_fp32_fails_the_image(dtype: torch.dtype) -> None:
    [made] = ended(requested(ASKED[:1], with_vae(dtype, torch.inf)))
    assert isinstance(made, GenerationFailed)
    assert "VAE overflows even in fp32" in made.message
