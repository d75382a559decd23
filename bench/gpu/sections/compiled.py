"""torch.compile beneath CUDA graphs, with channels last: what the compiler adds to graphs.

On a CPU nothing is generated (backend "eager"): only the tracing is rehearsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters

from bench.gpu.bench import Bench
from bench.gpu.sections.graphs import GraphedUnet, calls, engine
from bench.gpu.subjects import Subject, build, unet_inputs
from bench.gpu.timing import wall_seconds

REPEATED = ("BasicTransformerBlock", "ResnetBlock2D")
RECOMPILES = 128  # each width of a repeated block is compiled once


def whole(bench: Bench, model: str) -> None:
    """The whole UNet, for any number of rows of one size."""
    subject = build(model, bench)
    channels_last(bench, subject)
    torch._dynamo.config.recompile_limit = RECOMPILES
    with bench.part(20, what="compile for any number of rows", model=model):
        call = torch.compile(subject.pipeline.unet, backend=_backend(bench))
        seconds = wall_seconds(partial(_first_call, bench, subject, call), bench.device)
        bench.row({"seconds": seconds}, what="compile for any number of rows", model=model)
        under_graphs(bench, subject, call, [2 * images for images in bench.images], "compiled")
        return
    torch.compiler.reset()
    rows = 2 * max(bench.images)
    with bench.part(20, what="compile for one number of rows", model=model):
        call = torch.compile(subject.pipeline.unet, backend=_backend(bench), dynamic=False)
        inputs = unet_inputs(subject, rows)
        seconds = wall_seconds(partial(call, **inputs), bench.device)
        bench.row({"seconds": seconds}, what="compile for one number of rows", model=model)
        under_graphs(bench, subject, call, [rows], "compiled for its rows")


def blocks(bench: Bench, model: str) -> None:
    """Only the blocks that repeat: compiled in a fraction of the time."""
    subject = build(model, bench)
    subject.pipeline.unet.to(memory_format=torch.channels_last)
    torch._dynamo.config.recompile_limit = RECOMPILES
    unet = subject.pipeline.unet
    rows = 2 * max(bench.images)
    with bench.part(15, what="compile blocks", model=model):
        for module in unet.modules():
            if type(module).__name__ in REPEATED:
                module.compile(backend=_backend(bench), dynamic=False)
        inputs = unet_inputs(subject, rows)
        seconds = wall_seconds(partial(unet, **inputs), bench.device)
        bench.row({"seconds": seconds}, what="compile repeated blocks", model=model, rows=rows)
        under_graphs(bench, subject, unet, [rows], "compiled blocks")


def channels_last(bench: Bench, subject: Subject) -> None:
    """First without a compiler: the effect of the memory order alone."""
    subject.pipeline.unet.to(memory_format=torch.channels_last)
    calls(bench, subject, subject.pipeline.unet, [max(bench.images)], "channels last")


def under_graphs(
    bench: Bench, subject: Subject, call: Any, buckets: Sequence[int], variant: str
) -> None:
    """Each number of rows: the compiled call, then replayed, then the engine's whole step."""
    images = [rows // 2 for rows in buckets]
    calls(bench, subject, call, images, variant)
    with bench.part(5, what="graphs of compiled calls", variant=variant, model=subject.name):
        graphed = GraphedUnet(subject.pipeline.unet, call)
        graphed.capture(subject, buckets)
        calls(bench, subject, graphed, images, f"{variant}, graph")
        engine(bench, subject, graphed, images, f"{variant}, graph")
    count = counters["stats"]["unique_graphs"]
    bench.row({"compiled": count}, what="graphs that the compiler made", variant=variant)


def _first_call(bench: Bench, subject: Subject, compiled: Any) -> None:
    """Compiles; marked dimensions may differ in later calls, the size of images may not."""
    rows = 2 * max(bench.images)
    inputs = unet_inputs(subject, rows)
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    for tensor in (*tensors, *(inputs["added_cond_kwargs"] or {}).values()):
        torch._dynamo.mark_dynamic(tensor, 0, min=2, max=rows)
    compiled(**inputs)


def _backend(bench: Bench) -> str:
    return "inductor" if bench.on_gpu else "eager"
