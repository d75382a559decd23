"""The oracle, a stock diffusers pipeline run alone, and the engine's parts on its components."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sdbento.catalog import ModelSpec
from sdbento.families import Family
from sdbento.intake import make_trajectories, settle
from sdbento.pipelines import Pipeline
from sdbento.planner import Planner
from sdbento.runner import TorchRunner, decode_pixels
from sdbento.samplers import SamplerSpec, build_scheduler
from sdbento.schemas import GenerateRequest
from sdbento.trajectory import Stage, StepPlan, StepResult, Trajectory
from tests.tiny import tiny_pipeline

Pixels = NDArray[np.float32]


class KeepingPixels(TorchRunner):
    """The real runner; keeps the decoded pixels before they are rounded to 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels: dict[Trajectory, Pixels] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.stage is Stage.DECODE:
            decoded = decode_pixels(plan.trajectories)
            self.pixels.update(zip(plan.trajectories, decoded, strict=True))
        return super().execute(plan)


def tiny_model(family: str, name: str | None = None, seed: int = 0) -> Pipeline:
    """A tiny random model as the engine would lease it."""
    pipe = tiny_pipeline(family, seed)
    spec = ModelSpec(
        name=name or f"tiny-{family}",
        family=Family(family),
        sources=(),
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=5.0,
        sampler=None,
        memory_gb=0.1,
    )
    return Pipeline(
        spec=spec,
        pipe=pipe,
        device=torch.device("cpu"),
        dtype=torch.float32,
        vae_dtype=torch.float32,
        nbytes=0,
    )


def settled(model: Pipeline, **fields: Any) -> GenerateRequest:
    return settle(GenerateRequest(**fields), model.spec, max_pixels=2048**2)


def trajectories_of(model: Pipeline, **fields: Any) -> list[Trajectory]:
    return make_trajectories(settled(model, **fields), model)


def run_together(
    groups: Sequence[list[Trajectory]], max_images: int = 4, arrivals: Sequence[int] = ()
) -> list[list[Pixels]]:
    """Pixels of every group's images; group i arrives after `arrivals[i]` plans."""
    runner, planner = KeepingPixels(), Planner(max_images)
    waiting = sorted(
        zip(arrivals or [0] * len(groups), groups, strict=True), key=lambda pair: pair[0]
    )
    num_plans = 0
    while True:
        while waiting and waiting[0][0] <= num_plans:
            planner.add(waiting.pop(0)[1])
        plan = planner.plan(float(num_plans))
        num_plans += 1
        if plan is not None:
            planner.update(plan, runner.execute(plan), float(num_plans))
        elif not waiting:
            return [[runner.pixels[t] for t in group] for group in groups]


def engine_pixels(model: Pipeline, **fields: Any) -> Pixels:
    """The one image of one request that has the engine for itself."""
    return run_together([trajectories_of(model, **fields)])[0][0]


def stock_pixels(model: Pipeline, **fields: Any) -> Pixels:
    """The same image by the stock pipeline, called as its users call it."""
    request = settled(model, **fields)
    pipe = model.pipe
    spec = SamplerSpec(
        request.scheduler or pipe.scheduler.config["_class_name"],
        request.sigmas,
        request.timestep_spacing,
        request.eta,
    )
    own = pipe.scheduler
    extra: dict[str, Any] = {}
    if model.is_sdxl:
        for name in ("original_size", "target_size", "negative_original_size"):
            extra[name] = getattr(request, name)
        extra["negative_target_size"] = request.negative_target_size
        extra["crops_coords_top_left"] = request.crops_coords_top_left
        extra["negative_crops_coords_top_left"] = request.negative_crops_coords_top_left
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what stock pipelines deprecate is not ours to mend
        try:
            pipe.scheduler = build_scheduler(spec, model.scheduler_config)
            pipe.set_progress_bar_config(disable=True)
            images: Sequence[Pixels] = pipe(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                width=request.width,
                height=request.height,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                guidance_rescale=request.guidance_rescale,
                eta=request.eta,
                generator=torch.Generator().manual_seed(request.seed or 0),
                output_type="np",
                **extra,
            ).images
        finally:
            pipe.scheduler = own
    return images[0]
