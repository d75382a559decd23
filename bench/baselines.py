"""What people write today: BentoML services around the stock diffusers pipeline.

`OneByOne` calls the pipeline for one request at a time. `Batchable` is the same with BentoML's
adaptive batching: inside the batch it groups requests with equal parameters, for only those can
share a pipeline call. Both serve the same model as sdbento.
"""

from __future__ import annotations

import os
from collections import defaultdict
from io import BytesIO
from typing import Any

import bentoml
import torch
from diffusers import StableDiffusionPipeline
from PIL.Image import Image
from starlette.responses import Response

from sdbento.samplers import SamplerSpec, build_scheduler

GROUPED_BY = ("num_inference_steps", "guidance_scale", "scheduler", "width", "height")
MAX_BATCH_SIZE = 8


class Stock:
    """A stock pipeline and the schedulers that the trace asks for."""

    def __init__(self) -> None:
        # Folder of the model; the benchmark hands it to the server it starts.
        self.pipe = StableDiffusionPipeline.from_pretrained(
            os.environ["BENCH_MODEL"], dtype=torch.float32
        )
        self.pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe.set_progress_bar_config(disable=True)
        self._config = dict(self.pipe.scheduler.config)

    def __call__(self, requests: list[dict[str, Any]]) -> list[Image]:
        """One pipeline call for requests that differ in prompt and seed alone."""
        common = requests[0]
        self.pipe.scheduler = build_scheduler(SamplerSpec(common["scheduler"]), self._config)
        images: list[Image] = self.pipe(
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


@bentoml.service(workers=1, threads=1, traffic={"timeout": 3600})
class OneByOne:
    def __init__(self) -> None:
        self.stock = Stock()

    @bentoml.api
    def txt2img(self, request: dict[str, Any], /) -> Image:
        [image] = self.stock([request])
        return Response(_png(image), media_type="image/png")  # type: ignore[return-value]


@bentoml.service(workers=1, threads=1, traffic={"timeout": 3600})
class Batchable:
    def __init__(self) -> None:
        self.stock = Stock()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=3_600_000)
    def txt2img(self, requests: list[dict[str, Any]]) -> list[str]:
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[tuple(request[name] for name in GROUPED_BY)].append(i)
        answers = [""] * len(requests)
        for members in groups.values():
            for i, image in zip(members, self.stock([requests[i] for i in members]), strict=True):
                answers[i] = _png(image).hex()
        return answers
