"""PRECISION=fp8: how fast it is on full-size networks, and what it does to images of `shapes`."""

from __future__ import annotations

from statistics import mean

import torch

from bench.fp8 import PROMPTS, models, pictures, psnr
from bench.gpu.bench import Bench
from bench.gpu.sections.compiled import compiled, under_graphs
from bench.gpu.sections.graphs import calls
from bench.gpu.subjects import build
from sdbento.models.acceleration.fp8 import convert


def measure(bench: Bench, model: str) -> None:
    images = [max(bench.images)]
    subject = build(model, bench, torch.bfloat16)
    calls(bench, subject, subject.pipeline.unet, images, "bf16")
    with bench.part(5, what="fp8"):
        count = convert(subject.pipeline.unet)
        bench.row({"layers": count}, what="linear layers in fp8", model=model)
        calls(bench, subject, subject.pipeline.unet, images, "fp8")
    with bench.part(20, what="fp8, compiled"):
        subject.pipeline.unet.to(memory_format=torch.channels_last)
        under_graphs(bench, compiled(bench, subject), "fp8, compiled")
    with bench.part(5, what="images of shapes"):
        images_of_shapes(bench)


def images_of_shapes(bench: Bench) -> None:
    """How near to fp32 the images of real weights are, in bf16 and with fp8 layers."""
    fields = {"width": 64, "height": 64, "num_inference_steps": 2} if bench.toy else {}
    images = pictures(models(), PROMPTS[: 1 if bench.toy else 4], **fields)
    figures = {
        f"{precision}_db": mean(map(psnr, images[precision], images["fp32"]))
        for precision in ("bf16", "fp8")
    }
    bench.row(dict(figures), what="images of shapes, mean PSNR against fp32")
