"""The usual services: BentoML around the stock diffusers pipeline.

`OneByOne` calls the pipeline for one request at a time. `Batchable` is the same with BentoML's
adaptive batching: inside the batch it groups requests with equal parameters, for only those can
share a pipeline call. Both serve the same model as sdbento.

Both get the care that sdbento takes of a CPU: all of torch's work on one thread, memory that stays
when it was freed, and a garbage collector that skips the libraries.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import bentoml
import torch
from diffusers import StableDiffusionPipeline
from PIL.Image import Image
from starlette.responses import Response

from sdbento.process.malloc import keep_freed_memory
from sdbento.samplers.scheduler import SamplerSpec, build_scheduler

keep_freed_memory()

GROUPED_BY = ("num_inference_steps", "guidance_scale", "scheduler", "width", "height")
MAX_BATCH_SIZE = 8


class Stock:
    """A stock pipeline, the schedulers that the trace asks for, and the thread that runs them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._pipe = self._thread.submit(self._load).result()
        self._config = dict(self._pipe.scheduler.config)
        gc.freeze()

    async def __call__(self, requests: list[dict[str, Any]]) -> list[bytes]:
        """PNG files, by one pipeline call for requests that differ in prompt and seed alone."""
        images = await asyncio.wrap_future(self._thread.submit(self._generate, requests))
        return [await asyncio.to_thread(_png, image) for image in images]

    def _load(self) -> Any:
        # The folder of the model; the benchmark passes it to the server that it starts.
        pipe = StableDiffusionPipeline.from_pretrained(
            os.environ["BENCH_MODEL"], dtype=torch.float32
        )
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _generate(self, requests: list[dict[str, Any]]) -> list[Image]:
        common = requests[0]
        self._pipe.scheduler = build_scheduler(SamplerSpec(common["scheduler"]), self._config)
        images: list[Image] = self._pipe(
            prompt=[request["prompt"] for request in requests],
            num_inference_steps=common["num_inference_steps"],
            guidance_scale=common["guidance_scale"],
            width=common["width"],
            height=common["height"],
            generator=[torch.Generator().manual_seed(request["seed"]) for request in requests],
        ).images
        return images


def _png(image: Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@bentoml.service(workers=1, traffic={"timeout": 3600})
class OneByOne:
    def __init__(self) -> None:
        self.stock = Stock()

    @bentoml.api
    async def txt2img(self, request: dict[str, Any], /) -> Image:
        [image] = await self.stock([request])
        return Response(image, media_type="image/png")  # type: ignore[return-value]


@bentoml.service(workers=1, traffic={"timeout": 3600})
class Batchable:
    def __init__(self) -> None:
        self.stock = Stock()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=3_600_000)
    async def txt2img(self, requests: list[dict[str, Any]]) -> list[str]:
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[tuple(request[name] for name in GROUPED_BY)].append(i)
        answers = [""] * len(requests)
        for members in groups.values():
            images = await self.stock([requests[i] for i in members])
            for i, image in zip(members, images, strict=True):
                answers[i] = image.hex()
        return answers
