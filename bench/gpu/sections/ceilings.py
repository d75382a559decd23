"""The device's best figures: matmuls, also of SDXL's sizes, attention by backend, convolutions.

The figures that a step is to be judged by. All operands are random, for zeros run faster.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.bench import Bench
from bench.gpu.rows import Label
from bench.gpu.timing import median_seconds
from sdbento.models.acceleration.fp8 import quantize, scaled_matmul

ROWS = 16  # of a UNet call: eight guided images
# Rows of a 1024x1024 image's activations a UNet row, inputs, outputs.
GEMMS = (
    ("qkv of 640", 4096, 640, 640),
    ("feed-forward in of 640", 4096, 640, 5120),
    ("feed-forward out of 640", 4096, 2560, 640),
    ("qkv of 1280", 1024, 1280, 1280),
    ("feed-forward in of 1280", 1024, 1280, 10240),
    ("feed-forward out of 1280", 1024, 5120, 1280),
)
# Queries, keys, heads, width of a head.
ATTENTIONS = (
    ("SDXL self, 640", 4096, 4096, 10, 64),
    ("SDXL self, 1280", 1024, 1024, 20, 64),
    ("SDXL cross, 640", 4096, 77, 10, 64),
    ("SD 1.5 self, 320", 4096, 4096, 8, 40),
)
CONVOLUTIONS = ((320, 128), (640, 64), (1280, 32))  # channels, side
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def measure(bench: Bench) -> None:
    with bench.part(what="copy"):
        copy(bench)
    side = 128 if bench.toy else 8192
    matmul(bench, f"{side} x {side} x {side}", side, side, side)
    rows = 1 if bench.toy else ROWS
    for name, tokens, width_in, width_out in GEMMS:
        shrink = 8 if bench.toy else 1
        matmul(bench, name, rows * tokens // shrink**2, width_in // shrink, width_out // shrink)
    for name, queries, keys, heads, width in ATTENTIONS:
        attention(bench, name, rows, (queries, keys, heads, width))
    for channels, side in CONVOLUTIONS:
        convolution(bench, channels, side)


def copy(bench: Bench) -> None:
    nbytes = 2**20 if bench.toy else 2**32
    source = torch.randn(nbytes // 4, device=bench.device)
    target = torch.empty_like(source)
    seconds = timed(bench, lambda: target.copy_(source))
    bench.row({"tb_per_s": 2 * nbytes / seconds / 1e12}, what="copy on the device")


def matmul(bench: Bench, name: str, rows: int, width_in: int, width_out: int) -> None:
    """bf16, then fp8 with a scale a row of both operands, without and with making it fp8."""
    a = torch.randn(rows, width_in, device=bench.device, dtype=torch.bfloat16)
    b = torch.randn(width_out, width_in, device=bench.device, dtype=torch.bfloat16)
    flop = 2 * rows * width_in * width_out

    def rate(precision: str, call: Callable[[], Any]) -> None:
        seconds = timed(bench, call)
        figures = {"ms": 1000 * seconds, "tflops": flop / seconds / 1e12}
        bench.row(figures, what="matmul", shape=name, precision=precision)

    with bench.part(what="matmul", shape=name, precision="bf16"):
        rate("bf16", lambda: F.linear(a, b))
    with bench.part(what="matmul", shape=name, precision="fp8"):
        if not bench.needs_cuda(what="matmul", shape=name, precision="fp8"):
            left, right = quantize(a), quantize(b)
            rate("fp8", lambda: scaled_matmul(left, right))
            rate("fp8, made of bf16", lambda: scaled_matmul(quantize(a), right))


def attention(bench: Bench, name: str, rows: int, shape: tuple[int, int, int, int]) -> None:
    queries, keys, heads, width = shape
    if bench.toy:
        queries, keys = queries // 64, max(keys // 64, 4)
    q = torch.randn(rows, heads, queries, width, device=bench.device, dtype=bench.dtype)
    k, v = (
        torch.randn(rows, heads, keys, width, device=bench.device, dtype=bench.dtype)
        for _ in range(2)
    )
    flop = 4 * rows * heads * queries * keys * width

    def row(backend: str, call: Callable[[], Any]) -> None:
        labels: dict[str, Label] = {"what": "attention", "shape": name, "backend": backend}
        with bench.part(**labels):
            seconds = timed(bench, call)
            bench.row({"ms": 1000 * seconds, "tflops": flop / seconds / 1e12}, **labels)

    def by(backend: SDPBackend) -> Any:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    row("as torch chooses", lambda: F.scaled_dot_product_attention(q, k, v))
    for backend, kernel in BACKENDS.items():
        if backend == "math" or not bench.needs_cuda(shape=name, backend=backend):
            row(backend, partial(by, kernel))
    if importlib.util.find_spec("xformers") is None:
        bench.note("not installed", shape=name, backend="xformers")
        return
    ops = importlib.import_module("xformers.ops")
    turned = [tensor.transpose(1, 2).contiguous() for tensor in (q, k, v)]
    row("xformers", lambda: ops.memory_efficient_attention(*turned))


def convolution(bench: Bench, channels: int, side: int) -> None:
    """SDXL's 3x3 convolutions, in both orders of memory."""
    rows, width = (1, channels // 32) if bench.toy else (ROWS, channels)
    side = side // 8 if bench.toy else side
    layer = torch.nn.Conv2d(width, width, 3, padding=1, device=bench.device, dtype=bench.dtype)
    x = torch.randn(rows, width, side, side, device=bench.device, dtype=bench.dtype)
    flop = 2 * 9 * rows * width**2 * side**2
    for order, memory in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
        labels: dict[str, Label] = {
            "what": "convolution",
            "shape": f"{channels} at {side}",
            "order": order,
        }
        with bench.part(**labels):
            weight, data = (t.contiguous(memory_format=memory) for t in (layer.weight, x))
            call = partial(F.conv2d, data, weight, layer.bias, padding=1)
            seconds = timed(bench, call)
            bench.row({"ms": 1000 * seconds, "tflops": flop / seconds / 1e12}, **labels)


def timed(bench: Bench, call: Callable[[], Any]) -> float:
    """Seconds of a call, the mean of ten that are queued at once."""
    return median_seconds(call, bench.device, bench.repeats, in_a_row=10 if bench.on_gpu else 1)
