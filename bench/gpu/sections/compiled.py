"""torch.compile beneath CUDA graphs, with channels last: what the compiler adds to graphs.

On a CPU nothing is generated (backend "eager"): only the tracing is rehearsed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from bench.gpu.bench import Bench
from bench.gpu.sections.graphs import calls, replayed
from bench.gpu.sections.serving import best_offline
from bench.gpu.subjects import Subject, build, unet_inputs
from bench.gpu.timing import wall_seconds
from sdbento.models.torch_compile import CompiledUnet

REPEATED = ("BasicTransformerBlock", "ResnetBlock2D")
RECOMPILES = 128  # each width of a repeated block is compiled once


def whole(bench: Bench, model: str) -> None:
    """The whole UNet: for any number of rows as SDBENTO_COMPILE does it, and for just one."""
    subject = build(model, bench)
    channels_last(bench, subject)
    unet, most = subject.pipeline.unet, 2 * max(bench.images)
    torch._dynamo.config.recompile_limit = RECOMPILES
    with bench.part(20, what="compile for any number of rows", model=model):
        folder = Path(tempfile.mkdtemp())  # nothing is kept: a first start is measured
        compiled = CompiledUnet(unet, folder, _backend(bench))
        compile_all = partial(compiled.compile, lambda n: compiled(**unet_inputs(subject, n)), most)
        seconds = wall_seconds(compile_all, bench.device)
        bench.row({"seconds": seconds}, what="compile for any number of rows", model=model)
        best = calling(subject, compiled)
        under_graphs(bench, best, bench.images, "compiled")
        best_offline(bench, best, "compiled, graph")
    torch.compiler.reset()
    with bench.part(20, what="compile for one number of rows", model=model):
        call = torch.compile(unet, backend=_backend(bench), dynamic=False)
        inputs = unet_inputs(subject, most)
        seconds = wall_seconds(partial(call, **inputs), bench.device)
        bench.row({"seconds": seconds}, what="compile for one number of rows", model=model)
        calls(bench, subject, call, [most // 2], "compiled for its rows")


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
        under_graphs(bench, subject, [rows // 2], "compiled blocks")


def channels_last(bench: Bench, subject: Subject) -> None:
    """First without a compiler: the effect of the memory order alone."""
    subject.pipeline.unet.to(memory_format=torch.channels_last)
    calls(bench, subject, subject.pipeline.unet, [max(bench.images)], "channels last")


def calling(subject: Subject, compiled: CompiledUnet) -> Subject:
    return replace(subject, pipeline=replace(subject.pipeline, compiled=compiled))


def under_graphs(bench: Bench, subject: Subject, images: Sequence[int], variant: str) -> None:
    """The compiled call, then whole steps with it, captured."""
    calls(bench, subject, subject.pipeline.compiled or subject.pipeline.unet, images, variant)
    replayed(bench, subject, f"{variant}, graph")
    count = counters["stats"]["unique_graphs"]
    bench.row({"compiled": count}, what="graphs that the compiler made", variant=variant)


def _backend(bench: Bench) -> str:
    return "inductor" if bench.on_gpu else "eager"
