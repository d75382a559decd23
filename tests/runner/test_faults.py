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
from sdbento.models.pipeline import num_bytes
from sdbento.runner import torch_runner
from sdbento.runner.torch_runner import TorchRunner
from sdbento.runner.vae import decode, decoder_dtype
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

        def call(*args: Any, **options: Any) -> Any:
            fail(members(*args))
            return function(*args, **options)

        patched.setattr(torch_runner, name, call)

    return patch


PLACES: dict[str, Patch] = {
    "prepare": around("first_state", lambda trajectory, _: [trajectory]),
    "step": around("call_unet", lambda _, owners, *rest: owners),
    "noise": around("_draw", lambda trajectory: [trajectory]),
    "mask": around("_put_back_unmasked", lambda trajectories, _: trajectories),
    "decode": around("_decode", lambda trajectories: trajectories),
}


def ended(
    trajectories: list[Trajectory], max_images: int = 8, runner: TorchRunner | None = None
) -> list[Any]:
    """The image of each, or why there is none. They are all there when the engine starts."""
    engine = Engine(runner or TorchRunner(), Planner(max_images))
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


def overflowing() -> tuple[Any, list[Any]]:
    """A model whose VAE overflows in fp16, and the images of ASKED as stock diffusers decodes them,
    with `force_upcast`: by the same weights in fp32."""
    half = with_vae(torch.float16, 3e4)
    pipe = copy.deepcopy(half.pipe)
    pipe.vae.float()
    return half, ended(requested(ASKED[:3], replace(half, pipe=pipe, vae_dtype=torch.float32)))


def assert_same(made: list[Any], expected: list[Any]) -> None:
    for one, other in zip(made, expected, strict=True):
        assert isinstance(one, np.ndarray), one
        assert np.abs(one - other).max() <= 1
        assert np.ptp(other) > 0


def counted_decodes(monkeypatch: pytest.MonkeyPatch, most: int = 8) -> list[tuple[Any, int]]:
    """What decodes in which precision, and of how many images; no more than `most` fit in fp32."""
    calls = list[tuple[Any, int]]()

    def counted(latents: torch.Tensor, pipeline: Any) -> torch.Tensor:
        dtype = decoder_dtype(pipeline)
        calls.append((dtype, len(latents)))
        if dtype is torch.float32 and len(latents) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents, pipeline)

    monkeypatch.setattr(torch_runner, "decode", counted)
    return calls


def test_a_vae_that_overflows_decodes_in_fp32_from_then_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (half, expected), grown = overflowing(), list[int]()
    encoder, nbytes = copy.deepcopy(half.vae.encoder.state_dict()), num_bytes([half.vae])
    calls = counted_decodes(monkeypatch)
    runner = TorchRunner(grow=lambda pipeline, more: grown.append(more))
    for _ in range(2):
        assert_same(ended(requested(ASKED[:3], half), runner=runner), expected)
    assert calls == [(torch.float16, 3), (torch.float32, 3), (torch.float32, 3)]
    assert caplog.text.count("the VAE overflows in torch.float16") == 1
    assert grown == [num_bytes([half.vae]) - nbytes] == [half.nbytes]
    for name, weight in half.vae.encoder.state_dict().items():
        assert weight.dtype is torch.float16
        assert torch.equal(weight, encoder[name])


def test_images_that_overflow_are_halved_where_fp32_takes_too_much_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half, expected = overflowing()
    calls = counted_decodes(monkeypatch, most=1)
    assert_same(ended(requested(ASKED[:3], half)), expected)
    assert sum(number for dtype, number in calls if dtype is torch.float32) == 3 + 1 + 2 + 1 + 1


def test_only_images_that_overflow_are_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    half, calls = with_vae(torch.float16, 1.0), list[tuple[torch.Tensor, torch.dtype]]()

    def overflow(latents: torch.Tensor, pipeline: Any) -> torch.Tensor:
        calls.append((latents, decoder_dtype(pipeline)))
        pixels = decode(latents, pipeline)
        if len(calls) == 1:
            pixels[1] = torch.nan
        return pixels

    expected = ended(requested(ASKED[:3], half))
    monkeypatch.setattr(torch_runner, "decode", overflow)
    assert_same(ended(requested(ASKED[:3], half)), expected)
    assert [(len(latents), dtype) for latents, dtype in calls] == [
        (3, torch.float16),
        (1, torch.float32),
    ]


@pytest.mark.parametrize("fits", [True, False])
def test_a_device_without_room_for_the_weights_in_fp32_keeps_them_as_they_are(
    fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, expected = overflowing()
    upcast, errors = torch.Tensor.float, [torch.OutOfMemoryError("CUDA out of memory")]

    def float_(tensor: torch.Tensor) -> torch.Tensor:
        is_last = tensor.data_ptr() == list(half.vae.decoder.parameters())[-1].data_ptr()
        if is_last and errors:
            raise errors[0] if not fits else errors.pop()
        return upcast(tensor)

    monkeypatch.setattr(torch.Tensor, "float", float_)
    made = ended(requested(ASKED[:3], half))
    if fits:  # at the second try
        assert_same(made, expected)
    else:
        assert all(isinstance(error, OutOfMemory) for error in made)
        assert {weight.dtype for weight in half.vae.parameters()} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_vae_that_overflows_even_in_fp32_fails_the_image(dtype: torch.dtype) -> None:
    [made] = ended(requested(ASKED[:1], with_vae(dtype, torch.inf)))
    assert isinstance(made, GenerationFailed)
    assert "VAE overflows even in fp32" in made.message
