"""From a request to the trajectories that make its images: defaults, limits, seeds, samplers.

`settle` needs only the catalogue, so that a bad request is refused before any model is loaded;
`make_trajectories` needs the resident model, whose scheduler configuration the sampler is compiled
from. Knows nothing of doors or of the engine.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from sdbento.catalog import ModelSpec
from sdbento.errors import InvalidParameter
from sdbento.pipelines import Pipeline
from sdbento.samplers import SamplerSpec, StepTable, canonical_name, compile_table
from sdbento.schemas import GenerateRequest
from sdbento.trajectory import BatchKey, ImageInputs, SizeConditioning, Trajectory

VAE_FACTOR = 8  # pixels a latent, in all three families
MODEL_DEFAULTS = ("width", "height", "num_inference_steps", "guidance_scale")


def settle(request: GenerateRequest, spec: ModelSpec, max_pixels: int) -> GenerateRequest:
    """The request with everything decided: the model's defaults filled in and the seed fixed.

    Raises InvalidParameter for a size above `max_pixels`, UnknownSampler for a sampler.
    """
    decided: dict[str, Any] = {"model": spec.name}
    for field in MODEL_DEFAULTS:
        if getattr(request, field) is None:
            decided[field] = getattr(spec, field)
    if request.seed in (None, -1):
        decided["seed"] = random.SystemRandom().randrange(2**32)
    sampler = request.scheduler or spec.sampler
    if sampler is not None:
        decided["scheduler"] = sampler
        canonical_name(sampler)
    settled = request.model_copy(update=decided)
    _check_pixels(settled, max_pixels)
    return settled


def _check_pixels(settled: GenerateRequest, max_pixels: int) -> None:
    assert settled.width and settled.height  # settle has filled them in
    if settled.width * settled.height > max_pixels:
        raise InvalidParameter(
            f"width x height must be at most {max_pixels} pixels; "
            f"given: {settled.width} x {settled.height} = {settled.width * settled.height}",
            param="width",
        )


def make_trajectories(settled: GenerateRequest, pipeline: Pipeline) -> list[Trajectory]:
    """One trajectory an image. Blocking: compiling a sampler for the first time takes a while."""
    assert settled.width and settled.height and settled.seed is not None
    assert settled.model and settled.guidance_scale is not None
    table = compile_sampler(settled, pipeline.scheduler_config)
    size = _size_conditioning(settled, settled.height, settled.width)
    return [
        Trajectory(
            key=BatchKey(settled.model, settled.height // VAE_FACTOR, settled.width // VAE_FACTOR),
            num_steps=table.num_steps,
            rows=2 if settled.guidance_scale > 1 else 1,
            inputs=ImageInputs(
                prompt=settled.prompt,
                negative_prompt=settled.negative_prompt,
                seed=settled.seed + i,
                guidance_scale=settled.guidance_scale,
                guidance_rescale=settled.guidance_rescale,
                table=table,
                size=size,
                negative_size=_negative_size_conditioning(settled, size),
            ),
            preview_every=settled.preview_every,
            pipeline=pipeline,
        )
        for i in range(settled.num_images)
    ]


def compile_sampler(settled: GenerateRequest, scheduler_config: Mapping[str, Any]) -> StepTable:
    """The compiled sampler a settled request asks for; the model's own where it names none."""
    assert settled.num_inference_steps is not None
    spec = SamplerSpec(
        name=settled.scheduler or str(scheduler_config["_class_name"]),
        sigmas=settled.sigmas,
        timestep_spacing=settled.timestep_spacing,
        eta=settled.eta,
    )
    return compile_table(spec, scheduler_config, settled.num_inference_steps)


def _size_conditioning(settled: GenerateRequest, height: int, width: int) -> SizeConditioning:
    return SizeConditioning(
        original_size=settled.original_size or (height, width),
        crops_coords_top_left=settled.crops_coords_top_left,
        target_size=settled.target_size or (height, width),
    )


def _negative_size_conditioning(
    settled: GenerateRequest, positive: SizeConditioning
) -> SizeConditioning:
    """As the stock SDXL pipeline: the positive one unless both negative sizes are given."""
    if settled.negative_original_size is None or settled.negative_target_size is None:
        return positive
    return SizeConditioning(
        original_size=settled.negative_original_size,
        crops_coords_top_left=settled.negative_crops_coords_top_left,
        target_size=settled.negative_target_size,
    )
