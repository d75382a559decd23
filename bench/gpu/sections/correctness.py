"""Real weights: the images of `shapes` by engine and stock, each against stock in fp32.

In fp16 and bf16 both round, in different places, but start from the same noise. The engine is right
when it is not farther from fp32 than the stock pipeline is by more than a tenth. Latents of both
are decoded the same way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu.bench import Bench
from bench.gpu.rows import Label
from bench.gpu.timing import true_fp32
from bench.noise import RoundedNoise
from sdbento.app import App
from sdbento.catalog.lookup import Catalog
from sdbento.engine.handle import Stepped
from sdbento.environment import load_settings
from sdbento.models.pipeline import ControlNet, Pipeline
from sdbento.models.weights import load
from sdbento.request.schema import GenerateRequest
from sdbento.runner.vae import decode
from sdbento.settings import Settings
from tests.support.images import data_uri, gradient, half_mask
from tests.support.oracle import Pixels, engine_pixels, settled
from tests.support.stock import stock_pipeline, stock_run

TENTH = 1.1
FLOOR = 1e-5  # of the mean difference on [0, 1]: what the order of sums alone does in fp32
LORA = "outline"
LORA_FOLDER = Path(__file__).parents[3] / "sdbento" / "bundled" / f"shapes-{LORA}"
PROMPT = "a large red circle on a blue background"
IMAGE = data_uri(gradient(128, 128))
CASES: Mapping[str, dict[str, Any]] = {
    "text": {},
    "Euler a": {"scheduler": "Euler a"},
    "DPM++ 2M SDE Karras": {"scheduler": "DPM++ 2M SDE Karras"},
    "LoRA": {"lora": [{"model_id": LORA}]},
    "ControlNet": {"controlnet": [{"type": "canny", "image": IMAGE}]},
    "inpaint": {"image": IMAGE, "mask_image": data_uri(half_mask(128, 128))},
    "img2img": {"image": IMAGE, "strength": 0.6},
}


@dataclass(frozen=True)
class Models:
    """`shapes` in one precision; `with_lora`: another copy, whose stock pipeline has the LoRA."""

    plain: Pipeline
    with_lora: Pipeline
    control: ControlNet
    settings: Settings


def measure(bench: Bench) -> None:
    exact, references = load_models("fp32"), dict[tuple[str, int], Pixels]()
    uncompiled: list[Any] = []
    for precision in ("fp16", "bf16", "fp32") if bench.on_gpu else ("fp32",):
        models = exact if precision == "fp32" else load_models(precision)
        for case in CASES:
            with bench.part(3, case=case, precision=precision), RoundedNoise():
                compare(bench, case, precision, models, exact, references)
        with bench.part(3, what="stock in a batch", precision=precision):
            stock_in_a_batch(bench, models, precision)
        eager: list[Any] = []
        with bench.part(5, what="the whole App", precision=precision):
            eager += asyncio.run(whole(bench, settings_of(precision, cuda_graphs=False), "eager"))
        uncompiled = uncompiled or eager
        with bench.part(5, what="the whole App with CUDA graphs", precision=precision):
            against_eager(bench, eager, settings_of(precision, cuda_graphs=True), "graphs")
    with bench.part(20, what="the whole App, compiled"):
        settings = settings_of("fp16", cuda_graphs=True, compile=True)
        against_eager(bench, uncompiled, settings, "compiled")


def settings_of(precision: str, **others: bool) -> Settings:
    return load_settings(sd_model="shapes", precision=precision, offline=True, **others)


def against_eager(bench: Bench, eager: list[Any], settings: Settings, variant: str) -> None:
    """The images of `whole`, made in another way."""
    what = f"App: {variant} against eager"
    if not bench.needs_cuda(what=what):
        made = asyncio.run(whole(bench, settings, variant))
        bench.row(levels(eager, made), what=what, precision=settings.precision)


def load_models(precision: str) -> Models:
    settings = settings_of(precision)
    catalog = Catalog(settings)
    spec = catalog.resolve("shapes")
    control = catalog.controlnets(spec).resolve("canny")
    plain, with_lora, network = load(spec, settings), load(spec, settings), load(control, settings)
    assert isinstance(plain, Pipeline) and isinstance(with_lora, Pipeline)
    assert isinstance(network, ControlNet)
    with_lora.pipe.load_lora_weights(LORA_FOLDER)
    return Models(plain, with_lora, network, settings)


def compare(
    bench: Bench,
    case: str,
    precision: str,
    models: Models,
    exact: Models,
    references: dict[tuple[str, int], Pixels],
) -> None:
    """`references`: images of `exact` made so far, by case and seed."""
    distances: dict[str, list[float]] = {"engine": [], "stock": []}
    largest = {"engine": 0.0, "stock": 0.0}
    for seed in range(1 if bench.toy else 2):
        fields = request_of(bench, case, seed)
        if (case, seed) not in references:
            with true_fp32():
                references[case, seed] = stock(exact, fields)
        reference = references[case, seed]
        images = {"engine": engine(models, fields), "stock": stock(models, fields)}
        for system, pixels in images.items():
            difference = np.abs(pixels - reference)
            distances[system].append(float(difference.mean()))
            largest[system] = max(largest[system], float(difference.max()))
    ours, theirs = (float(np.mean(values)) for values in distances.values())
    bench.row(
        {
            "engine_mean": ours,
            "stock_mean": theirs,
            "engine_largest": largest["engine"],
            "stock_largest": largest["stock"],
            "engine_is": "right" if ours <= TENTH * theirs + FLOOR else "FARTHER",
        },
        what="distance from stock fp32 on [0, 1]",
        case=case,
        precision=precision,
    )


def request_of(bench: Bench, case: str, seed: int) -> dict[str, Any]:
    side, steps = (64, 2) if bench.toy else (128, 12)
    size = {"width": side, "height": side, "num_inference_steps": steps}
    return {"prompt": PROMPT, "seed": seed, **size, **CASES[case]}


def _networks(models: Models, fields: Mapping[str, Any]) -> list[ControlNet]:
    return [models.control] if "controlnet" in fields else []


def engine(models: Models, fields: dict[str, Any]) -> Pixels:
    networks = _networks(models, fields)
    return engine_pixels(models.plain, controlnets=networks, settings=models.settings, **fields)


def stock(models: Models, fields: dict[str, Any]) -> Pixels:
    model = models.with_lora if "lora" in fields else models.plain
    request, images = settled(model, **fields)
    networks = [network.module for network in _networks(models, fields)]
    controls = [(n, c) for n, c in zip(networks, images.controls, strict=True) if c is not None]
    latents = stock_run(
        model,
        request,
        image=images.image,
        mask=images.mask,
        controls=controls,
        output_type="latent",
    )
    pixels: Pixels = decode(latents[None].float(), model)[0].cpu().numpy()
    return pixels


async def whole(bench: Bench, settings: Settings, variant: str) -> list[Any]:
    """All cases through a real App, alone and then all at once, one of them with previews.

    Returns the images that were made alone.
    """
    app = App(settings)
    app.start()
    try:
        while not app.ready and bench.left() > 2:
            time.sleep(0.05)
        cases = list(CASES)[: 4 if bench.toy else None]
        requests = [
            GenerateRequest(**request_of(bench, case, seed)) for seed, case in enumerate(cases)
        ]
        alone = [await pixels(app, request) for request in requests]
        together = await asyncio.gather(*(pixels(app, request) for request in requests))
        previews = await count_previews(app, requests[0])
        bench.row(
            levels(alone, together) | {"previews": previews},
            what=f"App: {len(cases)} requests together against alone, of 255 levels",
            precision=settings.precision if bench.on_gpu else "fp32",
            system=f"engine, {variant}",
        )
        return alone
    finally:
        await asyncio.to_thread(app.close, 5.0)


def stock_in_a_batch(bench: Bench, models: Models, precision: str) -> None:
    """The same images by one call of the stock pipeline and by one call for each."""
    fields = request_of(bench, "text", 0)
    size = {name: fields[name] for name in ("width", "height", "num_inference_steps")}
    seeds = range(2 if bench.toy else len(CASES))

    def images(*seeds: int) -> list[Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        pipe = stock_pipeline(models.plain)
        pipe.set_progress_bar_config(disable=True)
        made = pipe([PROMPT] * len(seeds), generator=generators, **size).images
        return [np.asarray(image, np.int16) for image in made]

    alone = [images(seed)[0] for seed in seeds]
    bench.row(
        levels(alone, images(*seeds)),
        what=f"stock: {len(seeds)} images together against alone, of 255 levels",
        precision=precision,
    )


def levels(images: list[Any], others: list[Any]) -> dict[str, Label]:
    """How far they are apart, of 255: the furthest pixel, and the mean of all."""
    differences = [np.abs(a - b) for a, b in zip(images, others, strict=True)]
    return {
        "largest_levels": max(int(one.max()) for one in differences),
        "mean_levels": float(np.mean([one.mean() for one in differences])),
    }


async def pixels(app: App, request: GenerateRequest) -> Any:
    result = await app.run(request)
    return np.asarray(result.images[0], np.int16)


async def count_previews(app: App, request: GenerateRequest) -> int:
    events = app.stream(request.model_copy(update={"preview_every": 1}))
    return sum([isinstance(e, Stepped) and e.preview is not None async for e in events])
