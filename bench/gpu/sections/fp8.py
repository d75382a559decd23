"""Linear layers of the transformer blocks in fp8, with a scale a row: speed, and what it costs.

torch has no fp8 convolution, so the rest stays bf16. Random weights show the speed only; what it
does to images is seen on `shapes`. On a CPU the matmul is a stand-in that rounds the same way.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.gpu.bench import Bench
from bench.gpu.sections.correctness import engine, load_models, request_of, stock
from bench.gpu.sections.graphs import GraphedUnet, calls
from bench.gpu.subjects import Subject, build, unet_inputs
from bench.gpu.timing import true_fp32

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
LITTLE = 1e-12  # a row of zeros has a scale, too
BLOCK = "BasicTransformerBlock"
OF_THE_TEXT = ("attn2.to_k", "attn2.to_v")  # 77 tokens: nothing to gain

Quantized = tuple[Tensor, Tensor]  # fp8 [rows, width] and its scales [rows, 1]


def quantize(x: Tensor) -> Quantized:
    scale = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=LITTLE)
    return (x.float() / scale).to(FP8), scale


def scaled_matmul(x: Quantized, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """[rows, out] bf16 of x [rows, in] and weight [out, in]."""
    (a, a_scale), (b, b_scale) = x, weight
    if a.is_cuda:
        return torch._scaled_mm(
            a, b.t(), a_scale, b_scale.t(), bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    output = (a.float() * a_scale) @ (b.float() * b_scale).t()
    return (output if bias is None else output + bias).bfloat16()


class Fp8Linear(nn.Module):
    """In place of a linear layer: both operands in fp8, the output in the layer's own precision."""

    def __init__(self, layer: nn.Linear, make: Callable[[Tensor], Quantized]) -> None:
        super().__init__()
        self._make = make
        self.weight, self.scale = quantize(layer.weight)
        self.bias = None if layer.bias is None else layer.bias.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        made = self._make(x.flatten(0, -2))
        output = scaled_matmul(made, (self.weight, self.scale), self.bias)
        return output.view(*x.shape[:-1], -1).to(x.dtype)


def to_fp8(unet: nn.Module, make: Callable[[Tensor], Quantized]) -> int:
    """Replace the linear layers of the transformer blocks; returns how many."""
    count = 0
    for name, module in list(unet.named_modules()):
        if not isinstance(module, nn.Linear) or "transformer_blocks" not in name:
            continue
        if name.endswith(OF_THE_TEXT) or module.in_features % 16 or module.out_features % 16:
            continue
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, Fp8Linear(module, make))
        count += 1
    return count


def measure(bench: Bench, model: str) -> None:
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    with bench.part(5, what="images of shapes"):
        images_of_shapes(bench)
    images = bench.images[-2:]
    subject = build(model, bench, dtype)
    calls(bench, subject, subject.pipeline.unet, images, "bf16")
    with bench.part(5, what="fp8"):
        # Uncompiled, rounding to fp8 is five kernels a layer, which take longer than they save.
        make = torch.compile(quantize, backend=backend(bench), dynamic=True)
        count = to_fp8(subject.pipeline.unet, make)
        bench.row({"layers": count}, what="linear layers in fp8", model=model)
        calls(bench, subject, subject.pipeline.unet, images, "fp8")
        graphed = GraphedUnet(subject.pipeline.unet)
        graphed.capture(subject, [2 * count for count in images])
        calls(bench, subject, graphed, images, "fp8, graph")
    if importlib.util.find_spec("torchao") is None:
        bench.note("not installed", variant="torchao")
        return
    with bench.part(20, what="torchao"):
        torchao(bench, build(model, bench, dtype), images)


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
    graphed = GraphedUnet(unet)
    graphed.capture(subject, [rows])
    calls(bench, subject, graphed, images[-1:], "torchao, compiled blocks, graph")


def images_of_shapes(bench: Bench) -> None:
    """How far from stock fp32 the images of real weights are, in bf16 and with fp8 layers."""
    exact, models = load_models("fp32"), load_models("bf16")
    distances: dict[str, list[float]] = {"bf16": [], "fp8": []}
    requests = [request_of(bench, "text", seed) for seed in range(1 if bench.toy else 4)]
    with true_fp32():
        references = [stock(exact, request) for request in requests]
    for variant, values in distances.items():
        if variant == "fp8":
            to_fp8(models.plain.unet, quantize)
        for request, reference in zip(requests, references, strict=True):
            values.append(float(abs(engine(models, request) - reference).mean()))
    figures = {f"{name}_mean": sum(values) / len(values) for name, values in distances.items()}
    bench.row(dict(figures), what="images of shapes, distance from stock fp32")


def backend(bench: Bench) -> str:
    return "inductor" if bench.on_gpu else "eager"
