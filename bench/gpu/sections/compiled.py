"""torch.compile beneath CUDA graphs, with channels last: what the compiler adds to graphs.

On a CPU nothing is generated (backend "eager"): only the tracing is rehearsed.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from bench.gpu.bench import Bench
from bench.gpu.sections.eager import against_fp32, profiled
from bench.gpu.sections.graphs import calls, new_graphs, replayed
from bench.gpu.sections.serving import best_offline
from bench.gpu.subjects import Subject, build, unet_inputs
from bench.gpu.timing import wall_seconds
from sdbento.models.acceleration import channels_last
from sdbento.models.acceleration.torch_compile import CompiledUnet

LEFT_FOR_THE_REST = 40.0  # seconds


def measure(bench: Bench, model: str) -> None:
    subject = build(model, bench)
    subject.pipeline.unet.to(memory_format=torch.channels_last)
    calls(bench, subject, subject.pipeline.unet, [max(bench.images)], "channels last")
    with bench.part(20, what="compile", model=model):
        subject = compiled(bench, subject)
        under_graphs(bench, subject, "compiled")
        with bench.part(6, what="latents against stock fp32", model=model):
            against_fp32(bench, subject, other="uncompiled")


def compiled(bench: Bench, subject: Subject) -> Subject:
    """As SDBENTO_COMPILE does it, and how long each number of rows takes.

    Of each kind of block that is the first time in a run of the bench; after that its code is in a
    folder, as after the first start of a server.
    """
    channels_last.install(subject.pipeline.unet)
    channels_last.install(subject.pipeline.vae)
    folder = Path(tempfile.gettempdir(), f"sdbento-compiled-{bench.log.run}")
    unet = CompiledUnet(subject.pipeline.unet, folder, "inductor" if bench.on_gpu else "eager")

    def call(rows: int) -> None:
        if rows == 1 and bench.left() < LEFT_FOR_THE_REST:
            return  # it is needed by none of the other figures
        seconds = wall_seconds(lambda: unet(**unet_inputs(subject, rows)), bench.device)
        figures = {"seconds": seconds, "kinds_so_far": counters["stats"]["unique_graphs"]}
        bench.row(figures, what="compile", model=subject.name, rows=rows)

    unet.compile(call, 2 * max(bench.images))
    return replace(subject, pipeline=replace(subject.pipeline, compiled=unet))


def under_graphs(bench: Bench, subject: Subject, way: str) -> None:
    """The compiled call; then whole steps with it, captured; then images."""
    assert subject.pipeline.compiled is not None
    calls(bench, subject, subject.pipeline.compiled, bench.images, way)
    variant = f"{way}, graph"
    replayed(bench, subject, variant)
    best_offline(bench, subject, variant)
    most = max(bench.images)
    with bench.part(8, what="profile", model=subject.name, images=most):
        profiled(bench, subject, most, new_graphs(bench), variant)
