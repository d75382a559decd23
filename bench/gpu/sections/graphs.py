"""CUDA graphs, by hand: the UNet call captured for some numbers of rows, as the engine could.

A prototype, for the bench alone. `GraphedUnet` stands in the UNet's place. Calls of any number of
rows are padded to the next bucket; rows do not depend on each other, so padding may hold anything
finite. On a CPU the captured call is simply made again, so that all else is rehearsed.
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
from bench.gpu.timing import (
    median_seconds,
    peak_gb,
    reserved_gb,
    reset_peak,
    wall_seconds,
)

Inputs = dict[str, Any]
WARMUPS = 3


class Captured:
    """One UNet call with fixed buffers for what goes in and out."""

    def __init__(self, call: Callable[..., Any], inputs: Inputs, pool: Any) -> None:
        self.inputs = inputs
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        if not inputs["sample"].is_cuda:
            self.output = self._run()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: whoever loads a model meanwhile may allocate
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = self._run()

    def _run(self) -> torch.Tensor:
        output: torch.Tensor = self._call(**self.inputs)[0]
        return output

    def replay(self) -> torch.Tensor:
        if self._graph is None:
            self.output = self._run()
        else:
            self._graph.replay()
        return self.output


class GraphedUnet:
    """A UNet whose calls are replayed. For calls without LoRAs and ControlNets."""

    def __init__(self, unet: Any, call: Callable[..., Any] | None = None) -> None:
        self._unet = unet
        self._call = unet if call is None else call
        self._captured: dict[int, Captured] = {}
        on_gpu = unet.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def capture(self, subject: Subject, buckets: Sequence[int]) -> None:
        """Captures the largest first, so that the smaller ones reuse its memory."""
        for rows in sorted(buckets, reverse=True):
            self._captured[rows] = Captured(self._call, unet_inputs(subject, rows), self.pool)

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor]:
        rows = len(sample)
        bucket = min(known for known in self._captured if known >= rows)
        captured = self._captured[bucket]
        given = {
            "sample": sample,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            **(added_cond_kwargs or {}),
        }
        buffers = {**captured.inputs, **(captured.inputs["added_cond_kwargs"] or {})}
        for name, tensor in given.items():
            buffers[name][:rows].copy_(tensor)
        return (captured.replay()[:rows].clone(),)


def measure(bench: Bench, model: str) -> None:
    subject = build(model, bench)
    graphed = captured(bench, subject)
    if graphed is not None:
        with bench.part(5, what="bitwise", model=model):
            bitwise(bench, subject, graphed)
        calls(bench, subject, subject.pipeline.unet, bench.images, "eager")
        calls(bench, subject, graphed, bench.images, "graph")
        engine(bench, subject, graphed, bench.images, "graph")


def eager_and_graphs(bench: Bench, model: str) -> None:
    steps(bench, build(model, bench))
    measure(bench, model)


def captured(bench: Bench, subject: Subject) -> GraphedUnet | None:
    """What capture costs in seconds and memory. None where it failed."""
    labels: dict[str, Label] = {"model": subject.name, "precision": bench.precision}
    buckets = [2 * images for images in bench.images]
    with bench.part(5, what="capture", **labels):
        bench.needs_cuda(what="capture", **labels)
        graphed = GraphedUnet(subject.pipeline.unet)
        subject.pipeline.unet(**unet_inputs(subject, max(buckets)))  # its own workspaces
        reset_peak(bench.device)
        before = reserved_gb(bench.device)
        seconds = wall_seconds(lambda: graphed.capture(subject, buckets), bench.device)
        figures = {
            "seconds": seconds,
            "pool_gb": reserved_gb(bench.device) - before,
            "peak_gb": peak_gb(bench.device),
        }
        bench.row(figures, what=f"capture of {len(buckets)} row counts", **labels)
        return graphed
    return None


def bitwise(bench: Bench, subject: Subject, graphed: GraphedUnet) -> None:
    """A replay with new inputs against the same call without a graph; then a padded one."""
    rows = 2 * max(bench.images)
    for real, what in ((rows, "full"), (rows - 1, "padded by one row")):
        inputs = unet_inputs(subject, rows + 1)
        inputs = {name: _first(value, real) for name, value in inputs.items()}
        replayed = graphed(**inputs)[0]
        alone = subject.pipeline.unet(**inputs)[0]
        difference = (replayed.float() - alone.float()).abs().max()
        bench.row(
            {"equal": str(torch.equal(replayed, alone)), "largest": float(difference)},
            what="replay against eager",
            rows=what,
            model=subject.name,
        )


def _first(value: Any, rows: int) -> Any:
    if isinstance(value, dict):
        return {name: tensor[:rows] for name, tensor in value.items()}
    return value[:rows] if isinstance(value, torch.Tensor) else value


def calls(bench: Bench, subject: Subject, unet: Any, images: Sequence[int], variant: str) -> None:
    """Milliseconds of a UNet call, two rows per image."""
    labels: dict[str, Label] = {"what": "UNet call", "model": subject.name, "variant": variant}
    for rows in (2 * count for count in images):
        with bench.part(3, rows=rows, **labels):
            inputs = unet_inputs(subject, rows)
            seconds = median_seconds(partial(unet, **inputs), bench.device, bench.repeats)
            tflops = rows * subject.tflop_per_row / seconds
            bench.row({"ms": 1000 * seconds, "tflops": tflops}, rows=rows, **labels)


def engine(bench: Bench, subject: Subject, unet: Any, images: Sequence[int], variant: str) -> None:
    """A whole step of the engine with `unet` in its UNet's place, and that its latents are those
    of the engine without it."""
    labels: dict[str, Label] = {"model": subject.name, "system": f"engine, {variant}"}
    replayed = subject.with_unet(unet)
    for count in images:
        with bench.part(3, what="a step", images=count, **labels):
            seconds = engine_step_seconds(bench, replayed, count)
            figures = step_figures(subject, count, seconds)
            bench.row(figures, what="a step", images=count, **labels)
    with bench.part(5, what="latents", **labels):
        seeds = range(images[-1])
        run, plain = (EngineRun(s, seeds, 3).latents() for s in (replayed, subject))
        bench.row(
            {"relative_difference": float((run - plain).norm() / plain.norm())},
            what="latents after 3 steps, against the engine as it is",
            **labels,
        )
