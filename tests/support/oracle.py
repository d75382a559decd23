"""The engine's parts on tiny components, beside the stock pipelines on the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sdbento.catalog.families import Family
from sdbento.catalog.specs import ControlNetSpec, ModelSpec
from sdbento.engine.planner import Planner
from sdbento.engine.runner import TorchRunner, decode_pixels
from sdbento.engine.trajectory import Stage, StepPlan, StepResult, Trajectory
from sdbento.models.pipeline import ControlNet, Pipeline
from sdbento.request.build import Assembler, Job
from sdbento.request.passes import Resources
from sdbento.request.schema import GenerateRequest
from sdbento.request.settle import Pictures, draw_controls, fix_size, gather, settle
from sdbento.settings import Settings
from tests.support.stock import stock_run
from tests.support.tiny import tiny_controlnet, tiny_pipeline

Pixels = NDArray[np.float32]
SETTINGS = Settings.load()


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


def tiny_model(kind: str, name: str | None = None, seed: int = 0) -> Pipeline:
    """A tiny random model as the engine would lease it; `kind` as tiny_pipeline has it."""
    pipe = tiny_pipeline(kind, seed)
    spec = ModelSpec(
        name=name or f"tiny-{kind}",
        family=Family(kind.partition("-")[0]),
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


def tiny_control(family: str, seed: int = 0) -> ControlNet:
    spec = ControlNetSpec(f"tiny-control-{family}-{seed}", Family(family), (), 0.1, "canny")
    module = tiny_controlnet(family, seed)
    return ControlNet(spec, module, torch.device("cpu"), torch.float32, nbytes=0)


def settled(
    model: Pipeline, settings: Settings = SETTINGS, **fields: Any
) -> tuple[GenerateRequest, Pictures]:
    request = settle(GenerateRequest(**fields), model.spec)
    pictures = gather(request, settings)
    sized, _ = fix_size(request, model.spec, pictures, max_pixels=2048**2)
    return sized, draw_controls(sized, pictures)


def job_of(
    model: Pipeline,
    *,
    controlnets: Sequence[ControlNet] = (),
    refined_by: Pipeline | None = None,
    settings: Settings = SETTINGS,
    **fields: Any,
) -> Job:
    request, pictures = settled(model, settings, **fields)
    resources = Resources(model, tuple(controlnets), refined_by)
    return Assembler(settings).assemble(request, pictures, resources)


def trajectories_of(model: Pipeline, **options: Any) -> list[Trajectory]:
    return job_of(model, **options).trajectories


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
            for done in planner.update(plan, runner.execute(plan), float(num_plans)):
                planner.add([done.successor] if done.successor is not None else [])
        elif not waiting:
            return [[runner.pixels[last(t)] for t in group] for group in groups]


def last(trajectory: Trajectory) -> Trajectory:
    *_, leg = trajectory.chain
    return leg


def engine_pixels(model: Pipeline, **options: Any) -> Pixels:
    """The one image of one request that has the engine for itself."""
    job = job_of(model, **options)
    pixels = run_together([job.trajectories])[0][0]
    if job.overlay is None:
        return pixels
    image = Image.fromarray((pixels * 255).round().astype("uint8"))
    overlaid: Pixels = np.asarray(job.overlay.apply(image), np.float32) / np.float32(255)
    return overlaid


def stock_pixels(model: Pipeline, *, controlnets: Sequence[ControlNet] = (), **fields: Any) -> Any:
    """The same image by the stock pipeline."""
    request, pictures = settled(model, **fields)
    controls = [
        (network.module, picture)
        for network, picture in zip(controlnets, pictures.controls, strict=True)
        if picture is not None
    ]
    return stock_run(model, request, image=pictures.image, mask=pictures.mask, controls=controls)
