"""The engine's parts on tiny components, beside the stock pipelines on the same ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sdbento.catalog.families import Family
from sdbento.catalog.lookup import Catalog, ControlNets
from sdbento.catalog.specs import ControlNetSpec, ModelSpec
from sdbento.engine.planner import Planner
from sdbento.engine.trajectory import Launched, Stage, StepPlan, Trajectory
from sdbento.environment import load_settings
from sdbento.images import codec
from sdbento.models.pipeline import ControlNet, Pipeline
from sdbento.prompts.inversions import Inversions
from sdbento.request.build import TrajectoryBuilder
from sdbento.request.inputs import InputImages, arrange, make_control_images, sources
from sdbento.request.resolve import Resolver
from sdbento.request.resolved import ResidentModels, ResolvedRequest
from sdbento.request.schema import GenerateRequest
from sdbento.request.settle import SettledRequest, check_fields, settle
from sdbento.runner.graphs import Graphs
from sdbento.runner.state import state_of
from sdbento.runner.torch_runner import TorchRunner
from sdbento.runner.vae import decode
from sdbento.settings import Settings
from tests.support.stock import stock_run
from tests.support.tiny import tiny_controlnet, tiny_pipeline

Pixels = NDArray[np.float32]
SETTINGS = load_settings()


class KeepingPixels(TorchRunner):
    """The real runner; keeps the decoded pixels before they are rounded to 8 bits."""

    def __init__(self, graphs: Graphs | None = None) -> None:
        super().__init__(graphs=graphs)
        self.pixels: dict[Trajectory, Pixels] = {}

    def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        if plan.stage is Stage.DECODE:
            latents = torch.stack([state_of(t).slots[0] for t in plan.trajectories])
            with torch.inference_mode():
                decoded = decode(latents, plan.trajectories[0].pipeline).cpu().numpy()
            self.pixels.update(zip(plan.trajectories, decoded, strict=True))
        return super().launch(plan, pause)


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
    spec = ControlNetSpec(f"tiny-control-{family}-{seed}", Family(family), (), 0.1)
    module = tiny_controlnet(family, seed)
    return ControlNet(spec, module, torch.device("cpu"), torch.float32, nbytes=0)


class KnownControlNets(ControlNets):
    """The ControlNets of one request, in the order in which it names them."""

    def __init__(
        self, settings: Settings, model: ModelSpec, controlnets: Sequence[ControlNet]
    ) -> None:
        super().__init__(settings, model)
        self._asked = iter(controlnets)

    def known(self, name: str) -> ControlNetSpec | None:
        return next(self._asked).spec


class Known(Catalog):
    """A catalogue of just the models of one request, whatever names the request uses."""

    def __init__(
        self,
        settings: Settings,
        model: Pipeline,
        controlnets: Sequence[ControlNet],
        refiner: Pipeline | None,
    ) -> None:
        super().__init__(settings)
        self._model, self._refiner = model, refiner
        self._asked = KnownControlNets(settings, model.spec, controlnets)

    def known(self, name: str) -> ModelSpec | None:
        by_default = name == self._settings.sd_model
        return self._model.spec if by_default or self._refiner is None else self._refiner.spec

    def controlnets(self, model: ModelSpec) -> ControlNets:
        return self._asked


def settled(
    model: Pipeline, settings: Settings = SETTINGS, **fields: Any
) -> tuple[SettledRequest, InputImages]:
    request = GenerateRequest(**fields)
    check_fields(request, model.spec)
    read = {
        param: codec.read(image, settings, param=param) for param, image in sources(request).items()
    }
    images = arrange(request, read)
    sized, _ = settle(request, model.spec, images.size, max_pixels=2048**2)
    return sized, make_control_images(sized, images)


def resolved(
    model: Pipeline,
    *,
    controlnets: Sequence[ControlNet] = (),
    refined_by: Pipeline | None = None,
    settings: Settings = SETTINGS,
    **fields: Any,
) -> ResolvedRequest:
    resolver = Resolver(
        settings, Known(settings, model, controlnets, refined_by), Inversions(settings)
    )
    resolving = resolver.resolve(GenerateRequest(**fields), time.monotonic())
    with ThreadPoolExecutor(1) as thread:  # the test may itself run on an event loop
        return thread.submit(asyncio.run, resolving).result()


def trajectories_of(
    model: Pipeline,
    *,
    controlnets: Sequence[ControlNet] = (),
    refined_by: Pipeline | None = None,
    settings: Settings = SETTINGS,
    **fields: Any,
) -> list[Trajectory]:
    request = resolved(
        model, controlnets=controlnets, refined_by=refined_by, settings=settings, **fields
    )
    models = ResidentModels(model, tuple(controlnets), refined_by)
    return TrajectoryBuilder(settings, Inversions(settings)).build(request, models)[0]


def run_together(
    groups: Sequence[list[Trajectory]],
    max_images: int = 4,
    arrivals: Sequence[int] = (),
    graphs: Graphs | None = None,
) -> list[list[Pixels]]:
    """Pixels of every group's images; group i arrives after `arrivals[i]` plans."""
    runner, planner = KeepingPixels(graphs), Planner(max_images)
    waiting = sorted(
        zip(arrivals or [0] * len(groups), groups, strict=True), key=lambda pair: pair[0]
    )
    num_plans = 0
    while True:
        while waiting and waiting[0][0] <= num_plans:
            planner.add(waiting.pop(0)[1])
        plan = planner.plan()
        num_plans += 1
        if plan is not None:
            launched = runner.launch(plan)
            planner.advance(plan)
            planner.record(plan, launched.wait(), float(num_plans))
        elif not waiting:
            return [[runner.pixels[t] for t in group] for group in groups]


def engine_pixels(model: Pipeline, *, graphs: Graphs | None = None, **options: Any) -> Pixels:
    """The image of a request that runs alone in the engine."""
    pixels = run_together([trajectories_of(model, **options)], graphs=graphs)[0][0]
    canvas = resolved(model, **options).canvas
    if canvas is None or canvas.overlay is None:
        return pixels
    image = Image.fromarray((pixels * 255).round().astype("uint8"))
    overlaid: Pixels = np.asarray(canvas.overlay.apply(image), np.float32) / np.float32(255)
    return overlaid


def stock_pixels(model: Pipeline, *, controlnets: Sequence[ControlNet] = (), **fields: Any) -> Any:
    """The same image by the stock pipeline."""
    request, images = settled(model, **fields)
    controls = [
        (network.module, image)
        for network, image in zip(controlnets, images.controls, strict=True)
        if image is not None
    ]
    return stock_run(model, request, image=images.image, mask=images.mask, controls=controls)
