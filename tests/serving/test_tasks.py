"""Invariant 1 for every task: image to image, inpainting, ControlNet, refiner, second pass."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdbento.engine.trajectory import Trajectory
from sdbento.environment import load_settings
from sdbento.errors import InvalidParameter
from sdbento.models.pipeline import ControlNet, Pipeline
from sdbento.runner.graphs import Graphs
from sdbento.samplers.names import list_samplers
from tests.support.graphs import fake_graphs
from tests.support.images import box_mask, data_uri, gradient, half_mask
from tests.support.loras import everything, make_lora, save_kohya, save_peft
from tests.support.oracle import (
    Pixels,
    engine_pixels,
    run_together,
    settled,
    stock_pixels,
    tiny_control,
    tiny_model,
    trajectories_of,
)
from tests.support.stock import stock_pipeline, stock_run

FAMILIES = ["sd15", "sd21", "sdxl"]
SAMPLERS = [sampler.name for sampler in list_samplers() if "EDM" not in sampler.name]
PARITY = 1e-3  # of the decoded image on [0, 1]
IMAGE, MASK, EDGES = data_uri(gradient()), data_uri(half_mask()), data_uri(gradient(seed=5))
BASE: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 6, "seed": 7}

IMG2IMG: dict[str, Any] = {**BASE, "image": IMAGE, "strength": 0.6}
INPAINT: dict[str, Any] = {**BASE, "image": IMAGE, "mask_image": MASK}
CONTROL: dict[str, Any] = {
    "controlnet": {"type": "canny", "image": EDGES, "conditioning_scale": 0.8}
}


@cache
def model(kind: str) -> Pipeline:
    return tiny_model(kind)


@cache
def control(family: str, seed: int = 0) -> ControlNet:
    return tiny_control(family, seed)


def difference(kind: str, **options: Any) -> float:
    ours, theirs = (make(model(kind), **options) for make in (engine_pixels, stock_pixels))
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.01, "a flat image proves nothing"
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "task", [IMG2IMG, {**INPAINT, "strength": 0.7}], ids=["img2img", "inpaint"]
)
def test_every_sampler_does_every_task_as_the_stock_pipeline(
    task: dict[str, Any], sampler: str
) -> None:
    assert difference("sd15", **task, scheduler=sampler) <= PARITY


@pytest.mark.long
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["sd21", "sd21-inpaint", "sdxl", "sd21 with ControlNet"])
def test_every_sampler_repaints_as_the_stock_pipeline_for_that_very_task(
    kind: str, sampler: str
) -> None:
    """These models' own configurations leave out options that some stock constructors override."""
    family, _, controlled = kind.partition(" with ")
    extra = {**CONTROL, "controlnets": [control(family)]} if controlled else {}
    assert difference(family, **INPAINT, **extra, scheduler=sampler) <= PARITY


def old(kind: str, **options: Any) -> Pipeline:
    """A model whose repository has the scheduler configuration of the first SD 1.x repositories."""
    base = model(kind)
    pipe = copy.copy(base.pipe)
    pipe.scheduler = type(base.pipe.scheduler).from_config(base.scheduler_config, **options)
    return replace(base, pipe=pipe)


@pytest.mark.parametrize("sampler", [None, "DDIM"])
@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("sd15", BASE),
        ("sd15", IMG2IMG),
        ("sd15", INPAINT),
        ("sd15", {**BASE, **CONTROL}),
        ("sd15", {**IMG2IMG, **CONTROL}),
        ("sd15-inpaint", INPAINT),
    ],
    ids=range(6),
)
def test_an_old_repositorys_scheduler_is_changed_as_the_stock_constructor_of_the_task_does(
    kind: str, task: dict[str, Any], sampler: str | None
) -> None:
    mine = old(kind, steps_offset=0, skip_prk_steps=False)
    fields = {**task, "scheduler": sampler}
    networks = [control("sd15")] if "controlnet" in task else []
    ours, theirs = (
        make(mine, controlnets=networks, **fields) for make in (engine_pixels, stock_pixels)
    )
    assert np.abs(ours - theirs).max() <= PARITY


IMG2IMG_VARIANTS: list[dict[str, Any]] = [
    {},
    {"strength": 1.0},
    {"strength": 0.2},
    {"guidance_scale": 1.0},
    {"scheduler": "Euler a"},
    {"width": 72, "height": 104},
    {"image": data_uri(gradient(101, 77))},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", IMG2IMG_VARIANTS, ids=lambda v: str({**v, "image": 0}))
def test_img2img_is_the_stock_pipelines(family: str, variant: dict[str, Any]) -> None:
    assert difference(family, **{**IMG2IMG, **variant}) <= PARITY


def test_clip_skip_leaves_out_layers_as_the_stock_pipeline_does() -> None:
    """The stock SD 1.x pipelines fail with this version of transformers; the prompts' own tests
    compare with its text encoder."""
    skipped = {**BASE, "negative_prompt": "ugly", "clip_skip": 1}
    assert difference("sdxl", **skipped) <= PARITY
    plain = engine_pixels(model("sdxl"), **{**skipped, "clip_skip": None})
    assert np.abs(engine_pixels(model("sdxl"), **skipped) - plain).max() > 5 * PARITY


INPAINT_VARIANTS: list[dict[str, Any]] = [
    {},
    {"strength": 0.5},
    {"guidance_scale": 1.0, "scheduler": "Euler a"},
    {"scheduler": "DPM++ 2M SDE", "strength": 0.8},
    {"image": data_uri(gradient(100, 70)), "mask_image": data_uri(half_mask(90, 60))},
    {
        "image": data_uri(gradient(160, 120)),
        "mask_image": data_uri(box_mask(160, 120, (50, 40, 80, 70))),
        "padding_mask_crop": 8,
        "width": 64,
        "height": 64,
    },
]


@pytest.mark.parametrize("kind", [*FAMILIES, "sd15-inpaint", "sd21-inpaint", "sdxl-inpaint"])
@pytest.mark.parametrize("variant", INPAINT_VARIANTS, ids=range(len(INPAINT_VARIANTS)))
def test_inpainting_is_the_stock_pipelines(kind: str, variant: dict[str, Any]) -> None:
    limit = PARITY if "padding_mask_crop" not in variant else 1.01 / 255  # whole levels
    assert difference(kind, **{**INPAINT, **variant}) <= limit


CONTROL_VARIANTS: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 1.0},
    {"width": 80, "height": 64},
    {"controlnet": {"type": "x", "image": EDGES, "guidance_start": 0.2, "guidance_end": 0.7}},
    {"controlnet": {"type": "x", "image": EDGES, "conditioning_scale": 2.0}, "scheduler": "Heun"},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", [BASE, IMG2IMG, INPAINT], ids=["txt2img", "img2img", "inpaint"])
@pytest.mark.parametrize("variant", CONTROL_VARIANTS, ids=range(len(CONTROL_VARIANTS)))
def test_a_controlnet_steers_every_task_as_in_the_stock_pipeline(
    family: str, task: dict[str, Any], variant: dict[str, Any]
) -> None:
    fields = {**task, **CONTROL, **variant}
    assert difference(family, controlnets=[control(family)], **fields) <= PARITY


@pytest.mark.parametrize("family", FAMILIES)
def test_several_controlnets_add_up_as_in_the_stock_pipeline(family: str) -> None:
    several = [
        {"type": "a", "image": EDGES, "conditioning_scale": 0.5},
        {"type": "b", "image": IMAGE, "conditioning_scale": 0.9, "guidance_end": 0.5},
    ]
    networks = [control(family), control(family, 1)]
    assert difference(family, controlnets=networks, **BASE, controlnet=several) <= PARITY


def test_a_controlnet_changes_the_image() -> None:
    plain = engine_pixels(model("sd15"), **BASE)
    steered = engine_pixels(model("sd15"), controlnets=[control("sd15")], **BASE, **CONTROL)
    assert np.abs(plain - steered).max() > 20 * PARITY


def test_a_controlnet_of_an_inpainting_model_sees_four_channels() -> None:
    fields = {**INPAINT, **CONTROL}
    assert difference("sd15-inpaint", controlnets=[control("sd15")], **fields) <= PARITY


def test_a_controlnet_of_another_family_is_refused_by_name() -> None:
    with pytest.raises(InvalidParameter, match=r"tiny-control-sdxl-0 does not fit model tiny-sd15"):
        engine_pixels(model("sd15"), controlnets=[control("sdxl")], **BASE, **CONTROL)


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M Karras", "Heun", "DDIM"])
def test_the_refiner_goes_on_from_the_bases_latents_as_in_the_stock_pipelines(sampler: str) -> None:
    fields: dict[str, Any] = {
        **BASE,
        "num_inference_steps": 10,
        "scheduler": sampler,
        "negative_prompt": "ugly",
    }
    refiner = {"model": "r", "switch_at": 0.6}
    ours = engine_pixels(model("sdxl"), refined_by=model("sdxl-refiner"), refiner=refiner, **fields)
    request, _ = settled(model("sdxl"), **fields)
    latents = stock_run(model("sdxl"), request, denoising_end=0.6, output_type="latent")
    theirs = stock_run(model("sdxl-refiner"), request, latents=latents[None], denoising_start=0.6)
    assert np.abs(ours - theirs).max() <= PARITY


def test_an_ordinary_model_can_refine_even_itself() -> None:
    """With a deterministic single-step sampler, a run in two parts equals one in a single part."""
    fields: dict[str, Any] = {**BASE, "scheduler": "Euler", "prompt_2": "a dog"}
    refiner = {"model": "itself", "switch_at": 0.5}
    cut = engine_pixels(model("sdxl"), refined_by=model("sdxl"), refiner=refiner, **fields)
    assert np.abs(cut - engine_pixels(model("sdxl"), **fields)).max() <= PARITY


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("upscaler", ["lanczos", "latent"])
def test_the_second_pass_is_img2img_of_the_first(family: str, upscaler: str) -> None:
    fields: dict[str, Any] = {**BASE, "scheduler": "Euler"}
    hires = {"scale": 1.5, "strength": 0.5, "upscaler": upscaler, "steps": 8}
    ours = engine_pixels(model(family), hires=hires, **fields)
    assert ours.shape == (96, 96, 3)
    request, _ = settled(model(family), **fields)
    generator = torch.Generator().manual_seed(BASE["seed"])
    larger: Any
    if upscaler == "latent":
        first = stock_run(model(family), request, generator=generator, output_type="latent")
        larger = torch.nn.functional.interpolate(
            first[None], size=(12, 12), mode="bilinear", antialias=True
        )
    else:
        [image] = [stock_run(model(family), request, generator=generator, output_type="pil")]
        whole = Image.fromarray((image * 255).round().astype("uint8"))
        larger = whole.resize((96, 96), Image.Resampling.LANCZOS)
    again = request.model_copy(update={"num_inference_steps": 8, "strength": 0.5})
    theirs = stock_run(model(family), again, latents=larger, generator=generator)
    assert np.abs(ours - theirs).max() <= PARITY


def test_an_upscaled_image_is_img2img_of_the_enlarged_one() -> None:
    upscale = {"scale": 1.5, "strength": 0.4, "upscaler": "bicubic"}
    ours = engine_pixels(model("sd15"), **BASE, image=IMAGE, upscale=upscale)
    larger = gradient().resize((96, 96), Image.Resampling.BICUBIC)
    theirs = stock_pixels(model("sd15"), **BASE, image=data_uri(larger), strength=0.4)
    assert np.abs(ours - theirs).max() <= PARITY


def test_outside_its_interval_guidance_is_off() -> None:
    """The reference is the stock pipeline with a callback that sets its guidance scale."""
    fields: dict[str, Any] = {
        **BASE,
        "num_inference_steps": 8,
        "negative_prompt": "ugly",
        "guidance_scale": 6.0,
    }
    ours = engine_pixels(
        model("sd15"), guidance_start=0.25, guidance_end=0.75, scheduler="DDIM", **fields
    )
    request, _ = settled(model("sd15"), scheduler="DDIM", **fields)
    pipe = stock_pipeline(model("sd15"))
    prepare = pipe.prepare_extra_step_kwargs

    def scale_at(step: int) -> float:
        return 6.0 if 2 <= step < 6 else 1.0 + 1e-9

    def before_the_first(*args: Any) -> Any:
        pipe._guidance_scale = scale_at(0)
        return prepare(*args)

    def after(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        pipe._guidance_scale = scale_at(step + 1)
        return {}

    pipe.prepare_extra_step_kwargs = before_the_first
    theirs = stock_run(model("sd15"), request, pipe=pipe, callback_on_step_end=after)
    assert np.abs(ours - theirs).max() <= PARITY
    always = engine_pixels(model("sd15"), scheduler="DDIM", **fields)
    assert np.abs(ours - always).max() > 5 * PARITY


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a-FAMILY` in kohya's format and `b-FAMILY` in PEFT's, for every family."""
    folder = tmp_path_factory.mktemp("loras")
    for family in FAMILIES:
        marks = everything(family)
        save_kohya(family, make_lora(family, 1, marks=marks), folder / f"a-{family}.safetensors")
        save_peft(family, make_lora(family, 2, marks=marks), folder / f"b-{family}.safetensors")
    return folder


def with_adapters(family: str, folder: Path, weights: dict[str, float]) -> Pipeline:
    """The stock pipeline with LoRAs loaded and set, on networks of its own."""
    pipe = copy.deepcopy(model(family).pipe)
    with warnings.catch_warnings(action="ignore"):  # of a second adapter
        for name in weights:
            pipe.load_lora_weights(folder / f"{name}-{family}.safetensors", adapter_name=name)
    pipe.set_adapters(list(weights), list(weights.values()))
    return replace(model(family), pipe=pipe)


FEW: dict[str, Any] = {**BASE, "num_inference_steps": 4, "guidance_scale": 1.0}
LORA_TASKS = {
    "txt2img": BASE,
    "img2img": IMG2IMG,
    "inpaint": {**INPAINT, "strength": 0.9},
    "controlnet": {**BASE, **CONTROL},
    "lcm": {**FEW, "scheduler": "LCM"},
    "lightning": {**FEW, "scheduler": "Euler", "timestep_spacing": "trailing"},
    "tcd": {**FEW, "scheduler": "TCD", "eta": 0.3},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", LORA_TASKS.values(), ids=LORA_TASKS)
def test_loras_do_to_every_task_what_set_adapters_does(
    family: str, task: dict[str, Any], lora_folder: Path
) -> None:
    settings = load_settings(lora_dir=lora_folder)
    networks = [control(family)] if "controlnet" in task else []
    fields = {**task, "negative_prompt": "ugly"}
    tagged = {**fields, "prompt": f"a cat <lora:a-{family}:0.7>"}
    listed = {"model_id": f"b-{family}", "weight": -0.4}
    ours = engine_pixels(
        model(family), controlnets=networks, settings=settings, lora=listed, **tagged
    )
    stock = with_adapters(family, lora_folder, {"a": 0.7, "b": -0.4})
    theirs = stock_pixels(stock, controlnets=networks, **fields)
    assert np.abs(ours - theirs).max() <= PARITY
    plain = engine_pixels(model(family), controlnets=networks, **fields)
    assert np.abs(ours - plain).max() > 10 * PARITY


KINDS: list[dict[str, Any]] = [
    BASE,
    IMG2IMG,
    {**INPAINT, "strength": 0.9, "scheduler": "Euler a"},
    {**BASE, **CONTROL},
    {**INPAINT, **CONTROL, "scheduler": "DPM++ 2M SDE"},
    {**IMG2IMG, **CONTROL, "guidance_scale": 1.0},
    {**BASE, "guidance_start": 0.3, "guidance_end": 0.8, "scheduler": "Heun"},
    {**BASE, "hires": {"scale": 1.5, "strength": 0.5}},
    {**BASE, "hires": {"scale": 1.5, "strength": 0.5, "upscaler": "latent"}},
    {**IMG2IMG, "num_images": 2, "seed": 90},
    {**BASE, "prompt": "a cat <lora:a-FAMILY:0.7>"},
    {**BASE, "prompt": "a cat <lora:b-FAMILY:1.1>", **CONTROL},
    {**INPAINT, "prompt": "a cat <lora:a-FAMILY:0.3> <lora:b-FAMILY:-0.5>"},
    {**BASE, "prompt": "a (cat:1.3) " + "and a dog " * 30},
    {**IMG2IMG, "prompt": "a [cat:dog:0.5] " + "and a dog " * 30},
]


def of_every_kind(family: str, lora_folder: Path) -> list[list[Trajectory]]:
    return [
        trajectories_of(
            model(family),
            controlnets=[control(family)] if "controlnet" in fields else [],
            settings=load_settings(lora_dir=lora_folder),
            **{**fields, "prompt": fields["prompt"].replace("FAMILY", family)},
        )
        for fields in KINDS
    ]


@pytest.fixture(scope="module")
def alone(lora_folder: Path) -> Callable[[str], list[list[Pixels]]]:
    """The images of a family's requests, each made alone."""
    return cache(
        lambda family: [run_together([job])[0] for job in of_every_kind(family, lora_folder)]
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_images", [3, 16])
@pytest.mark.parametrize("graphs", [None, fake_graphs], ids=["eager", "graphs"])
def test_every_kind_of_row_is_the_same_alone_and_in_a_batch(
    family: str,
    max_images: int,
    graphs: Callable[[], Graphs] | None,
    lora_folder: Path,
    alone: Callable[[str], list[list[Pixels]]],
) -> None:
    arrivals = [i // 3 for i in range(len(KINDS))]
    jobs = of_every_kind(family, lora_folder)
    together = run_together(jobs, max_images, arrivals, graphs and graphs())
    for one, other in zip(alone(family), together, strict=True):
        assert np.abs(np.stack(one) - np.stack(other)).max() <= 1.01 / 255
