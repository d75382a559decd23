"""PRECISION=fp8: how fast it is on full-size networks, and what it does to images of `shapes`."""

from __future__ import annotations

import importlib.util
from statistics import mean

import torch
from torch import nn

from bench.fp8 import PROMPTS, models, pictures, psnr
from bench.gpu.bench import Bench
from bench.gpu.sections.graphs import calls, replayed
from bench.gpu.sections.serving import best_offline
from bench.gpu.subjects import Subject, build, unet_inputs
from sdbento.models.fp8 import convert

BLOCK = "BasicTransformerBlock"


def measure(bench: Bench, model: str) -> None:
    with bench.part(5, what="images of shapes"):
        images_of_shapes(bench)
    images = bench.images[-2:]
    subject = build(model, bench, torch.bfloat16)
    calls(bench, subject, subject.pipeline.unet, images, "bf16")
    with bench.part(5, what="fp8"):
        count = convert(subject.pipeline.unet)
        bench.row({"layers": count}, what="linear layers in fp8", model=model)
        calls(bench, subject, subject.pipeline.unet, images, "fp8")
        replayed(bench, subject, "fp8, graph")
        best_offline(bench, subject, "fp8, graph")
    if importlib.util.find_spec("torchao") is None:
        bench.note("not installed", variant="torchao")
        return
    with bench.part(20, what="torchao"):
        torchao(bench, build(model, bench, torch.bfloat16), images)


def torchao(bench: Bench, subject: Subject, images: list[int]) -> None:
    """torchao's layers, whose rounding only a compiler fuses, in compiled transformer blocks."""
    if bench.needs_cuda(variant="torchao"):
        return
    quantization = importlib.import_module("torchao.quantization")
    rowwise = quantization.PerRow()
    config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=rowwise)

    def wanted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "transformer_blocks" in name

    unet = subject.pipeline.unet
    quantization.quantize_(unet, config, filter_fn=wanted)
    torch._dynamo.config.recompile_limit = 64
    for module in unet.modules():
        if type(module).__name__ == BLOCK:
            module.compile(dynamic=False)
    rows = 2 * images[-1]
    unet(**unet_inputs(subject, rows))
    calls(bench, subject, unet, images[-1:], "torchao, compiled blocks")
    replayed(bench, subject, "torchao, compiled blocks, graph")


def images_of_shapes(bench: Bench) -> None:
    """How near to fp32 the images of real weights are, in bf16 and with fp8 layers."""
    fields = {"width": 64, "height": 64, "num_inference_steps": 2} if bench.toy else {}
    images = pictures(models(), PROMPTS[: 1 if bench.toy else 4], **fields)
    figures = {
        f"{precision}_db": mean(map(psnr, images[precision], images["fp32"]))
        for precision in ("bf16", "fp8")
    }
    bench.row(dict(figures), what="images of shapes, mean PSNR against fp32")
