"""CUDA graphs of whole steps, as the server captures them with SDBENTO_CUDA_GRAPHS.

On a CPU the captured step is simply computed again, so that all else is rehearsed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu.bench import Bench
from bench.gpu.rows import Label
from bench.gpu.sections.eager import engine_step_seconds, step_figures, steps
from bench.gpu.subjects import EngineRun, Subject, build, unet_inputs
from bench.gpu.timing import GB, median_seconds, peak_gb, reset_peak, wall_seconds
from sdbento.models.pipeline import Pipeline
from sdbento.runner.graphs import CudaCapture, Graphs
from tests.support.graphs import FakeCapture

MOST_ROWS = 16
STEPS = 3
# Images of a batch, and how many of them are without guidance: 16 rows, and 5 padded to 6.
BATCHES = {"full": (8, 0), "padded by one row": (3, 1)}


class Counted:
    """As much memory for graphs as they want; how much that is."""

    def __init__(self) -> None:
        self.nbytes = 0

    def room(self) -> int:
        return 10**15

    def grow(self, _: Pipeline, nbytes: int) -> None:
        self.nbytes += nbytes


def new_graphs(bench: Bench, memory: Counted | None = None) -> Graphs:
    """A step is captured when it comes for the first time."""
    capture = CudaCapture if bench.on_gpu else FakeCapture
    return Graphs(MOST_ROWS, memory or Counted(), capture, eager_calls=0)


def measure(bench: Bench, model: str) -> None:
    replayed(bench, build(model, bench), "graph")


def eager_and_graphs(bench: Bench, model: str) -> None:
    subject = build(model, bench)
    steps(bench, subject)
    replayed(bench, subject, "graph")


def replayed(bench: Bench, subject: Subject, variant: str) -> None:
    """Capture, that a replay computes what the eager step does, and a step's milliseconds."""
    labels: dict[str, Label] = {"model": subject.name, "variant": variant}
    memory = Counted()
    graphs = new_graphs(bench, memory)
    with bench.part(5, what="capture", **labels):
        reset_peak(bench.device)
        seconds = capture(bench, subject, graphs)
        bench.row({"seconds": seconds}, what="capture", **labels)
        if not bench.needs_cuda(what="memory of captured steps", **labels):
            figures = {"graphs_gb": memory.nbytes / GB, "peak_gb": peak_gb(bench.device)}
            bench.row(figures, what="memory of captured steps", **labels)
    for batch, (images, unguided) in BATCHES.items():
        with bench.part(5, what="replay against eager", rows=batch, **labels):
            figures_of_batch = differences(subject, images, unguided, new_graphs(bench))
            bench.row(figures_of_batch, what="replay against eager", rows=batch, **labels)
    for images in bench.images:
        with bench.part(3, what="a step", images=images, **labels):
            seconds = engine_step_seconds(bench, subject, images, graphs)
            of_a_step = step_figures(subject, images, seconds)
            bench.row(of_a_step, what="a step", images=images, **labels)


def capture(bench: Bench, subject: Subject, graphs: Graphs) -> float:
    """Seconds of one step for each number of images, the largest first: each is captured."""
    runs = [
        EngineRun(subject, range(images), 2, graphs)
        for images in sorted(bench.images, reverse=True)
    ]
    return sum(wall_seconds(run.step, bench.device) for run in runs)


def differences(subject: Subject, images: int, unguided: int, graphs: Graphs) -> dict[str, Label]:
    """Between the latents of replayed and eager steps of the same batch."""
    runs = [
        EngineRun(subject, range(images), STEPS, used, unguided).latents()
        for used in (None, graphs)
    ]
    eager, replays = runs
    return {
        "equal": str(torch.equal(eager, replays)),
        "relative_difference": float((eager - replays).norm() / eager.norm()),
    }


def calls(
    bench: Bench, subject: Subject, unet: Callable[..., Any], images: Sequence[int], variant: str
) -> None:
    """Milliseconds of a UNet call, two rows per image, launched kernel by kernel."""
    labels: dict[str, Label] = {"what": "UNet call", "model": subject.name, "variant": variant}
    for rows in (2 * count for count in images):
        with bench.part(3, rows=rows, **labels):
            inputs = unet_inputs(subject, rows)
            seconds = median_seconds(partial(unet, **inputs), bench.device, bench.repeats)
            tflops = rows * subject.tflop_per_row / seconds
            bench.row({"ms": 1000 * seconds, "tflops": tflops}, rows=rows, **labels)
