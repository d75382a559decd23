"""The reference: a stock diffusers pipeline, run alone, called as its users call it."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sdbento.models.pipeline import Pipeline
from sdbento.request.schema import GenerateRequest
from sdbento.samplers.scheduler import SamplerSpec, build_scheduler

Pixels = NDArray[np.float32]

SIZES = (
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "negative_original_size",
    "negative_crops_coords_top_left",
    "negative_target_size",
)


def stock_run(
    model: Pipeline,
    request: GenerateRequest,
    *,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    controls: Sequence[tuple[Any, Image.Image]] = (),
    latents: Any = None,
    pipe: Any = None,
    **extra: Any,
) -> Any:
    """The output of the stock pipeline for the task: an array [H, W, 3], or latents.

    `controls` are ControlNetModels with their images, scales are the request's; `latents` stand in
    place of `image`; `extra` goes to the call as it is.
    """
    networks = [network for network, _ in controls]
    is_image_task = image is not None or latents is not None
    scheduler = own_scheduler(model, request)
    if pipe is None:
        task = {"image": is_image_task, "mask": mask is not None}
        pipe = stock_pipeline(model, networks, scheduler=scheduler, **task)
    else:
        pipe.scheduler = scheduler
    given = _arguments(model, request, image, mask, controls) | extra
    if latents is not None:
        given["image"] = latents
    accepted = inspect.signature(pipe.__call__).parameters
    with warnings.catch_warnings(action="ignore"):  # stock deprecations do not matter
        pipe.set_progress_bar_config(disable=True)
        said = {name: value for name, value in given.items() if value is not None}
        answer = pipe(**{name: value for name, value in said.items() if name in accepted})
    made = answer.images[0]
    return np.asarray(made, np.float32) / 255 if isinstance(made, Image.Image) else made


def stock_pipeline(
    model: Pipeline,
    networks: Sequence[Any] = (),
    *,
    image: bool = False,
    mask: bool = False,
    scheduler: Any = None,
) -> Any:
    """The pipeline for a task, made of the model's components.

    Its constructor gets the scheduler too, because some change its configuration: a scheduler set
    afterwards would not make the image that users get.
    """
    task = "Inpaint" if mask else "Img2Img" if image else ""
    kind = f"StableDiffusion{'XL' if model.is_sdxl else ''}"
    kind += f"{'ControlNet' if networks else ''}{task}Pipeline"
    parts = dict(model.pipe.components)
    parts["scheduler"] = scheduler or copy.deepcopy(model.pipe.scheduler)
    if networks:
        parts["controlnet"] = list(networks) if len(networks) > 1 else networks[0]
    options: dict[str, Any] = {"requires_safety_checker": False}
    if model.is_sdxl:
        options = {"add_watermarker": False}
        options["force_zeros_for_empty_prompt"] = model.pipe.config.force_zeros_for_empty_prompt
        if task:
            options["requires_aesthetics_score"] = model.requires_aesthetics_score
    cls = getattr(diffusers, kind)
    wanted = inspect.signature(cls.__init__).parameters
    with warnings.catch_warnings(action="ignore"):
        return cls(**{name: part for name, part in parts.items() if name in wanted}, **options)


def own_scheduler(model: Pipeline, request: GenerateRequest) -> Any:
    """The scheduler that a request names, before any pipeline's constructor has changed it."""
    config = model.scheduler_config
    name = request.scheduler or config["_class_name"]
    spec = SamplerSpec(name, request.sigmas, request.timestep_spacing, request.eta)
    with warnings.catch_warnings(action="ignore"):
        return build_scheduler(spec, config)


def _arguments(
    model: Pipeline,
    request: GenerateRequest,
    image: Image.Image | None,
    mask: Image.Image | None,
    controls: Sequence[tuple[Any, Image.Image]],
) -> dict[str, Any]:
    names = ["prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "clip_skip"]
    names += ["guidance_rescale", "eta", "width", "height", "padding_mask_crop", "strength"]
    if model.is_sdxl:
        names += [*SIZES, "prompt_2", "negative_prompt_2"]
    given = {name: getattr(request, name) for name in names}
    given["generator"] = torch.Generator().manual_seed(request.seed or 0)
    given["output_type"] = "np" if request.padding_mask_crop is None else "pil"
    given |= {"image": image, "mask_image": mask}
    if image is not None and mask is None:
        given["image"] = _as_large_as(request, image)
    if controls:
        images = [_as_large_as(request, image) for _, image in controls]
        one = len(controls) == 1
        asked = request.controlnet or []
        given["image" if image is None else "control_image"] = images[0] if one else images
        for name, values in {
            "controlnet_conditioning_scale": [control.conditioning_scale for control in asked],
            "control_guidance_start": [control.guidance_start for control in asked],
            "control_guidance_end": [control.guidance_end for control in asked],
        }.items():
            given[name] = values[0] if one else values
    return given


def _as_large_as(request: GenerateRequest, image: Image.Image) -> Image.Image:
    """Stock img2img takes its size from the image."""
    if request.padding_mask_crop is not None:
        return image
    assert request.width is not None and request.height is not None
    return image.resize((request.width, request.height), Image.Resampling.LANCZOS)
