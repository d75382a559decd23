"""Costs beside the steps: first calls of new row counts, and moving models between devices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch

from bench.gpu.bench import Bench
from bench.gpu.rows import Label
from bench.gpu.subjects import EngineRun, Subject, build, unet_inputs
from bench.gpu.timing import GB, wall_seconds
from sdbento.models.memory import offload
from sdbento.models.pipeline import modules, num_bytes

LAPS = 3  # calls of each row count: the first one stalls, the others do not


def measure(bench: Bench, model: str) -> None:
    subject = build(model, bench)
    with bench.part(10, what="first calls", model=model):
        first_calls(bench, subject)
    other = build(model, bench)
    with bench.part(10, what="moving a model", model=model):
        moving(bench, subject, other)


def first_calls(bench: Bench, subject: Subject) -> None:
    """In a process that has computed nothing: seconds of the first and of the later calls."""
    most = 2 * max(bench.images)
    for rows in sorted({1, 2, 3, 4, 5, 7, 8, 12, most - 1, most} & set(range(most + 1))):
        inputs = unet_inputs(subject, rows)
        times = [
            wall_seconds(partial(subject.pipeline.unet, **inputs), bench.device)
            for _ in range(LAPS)
        ]
        bench.row(
            {"first_ms": 1000 * times[0], "later_ms": 1000 * min(times[1:])},
            what="first call of a row count",
            model=subject.name,
            rows=rows,
        )


def moving(bench: Bench, subject: Subject, other: Subject) -> None:
    """A model leaves and comes back, alone and beside the steps of another."""
    gb = num_bytes(modules(other.pipeline.pipe)) / GB

    def leave() -> Any:
        return offload.to_host(other.pipeline) if bench.on_gpu else other.pipeline

    seconds = wall_seconds(leave, bench.device)
    bench.row({"seconds": seconds, "gb": gb}, what="leaves", model=other.name)
    ways: dict[str, Callable[[], Any]] = {"on a stream of its own": partial(copied, other)}
    if not bench.needs_cuda(what="comes back", way="as offloading does it"):
        ways |= {"as offloading does it": lambda: offload.to_device(leave(), bench.device)}
    for way, move in ways.items():
        labels: dict[str, Label] = {"model": other.name, "way": way}
        leave()
        with bench.part(5, what="comes back", beside="nothing", **labels):
            seconds = wall_seconds(move, bench.device)
            figures = {"seconds": seconds, "gb_per_s": gb / seconds}
            bench.row(figures, what="comes back", beside="nothing", **labels)
        leave()
        with bench.part(5, what="comes back", beside="steps", **labels):
            figures_beside = beside_steps(bench, subject, move)
            bench.row(figures_beside, what="comes back", beside="steps", **labels)


def copied(other: Subject) -> list[torch.Tensor]:
    """Every tensor into fresh memory of the device, on a stream of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = torch.cuda.Stream() if device == "cuda" else None
    tensors = [t for module in modules(other.pipeline.pipe) for t in module.parameters()]
    with torch.cuda.stream(stream):
        made = [torch.empty_like(t, device=device).copy_(t, non_blocking=True) for t in tensors]
    if stream is not None:
        stream.synchronize()
    return made


def beside_steps(bench: Bench, subject: Subject, move: Callable[[], Any]) -> dict[str, Label]:
    """Seconds of `move`, and what it does to the steps that run meanwhile."""
    images = max(bench.images)
    with stepping(subject, images) as times:
        time.sleep(0.2 if bench.toy else 2.0)
        before = list(times)
        started = time.perf_counter()
        move()
        seconds = time.perf_counter() - started
        during = times[len(before) :]
    figures: dict[str, Label] = {"seconds": seconds}
    if before:
        figures["step_ms_before"] = 1000 * median(before)
    if during:
        figures["longest_step_ms_during"] = 1000 * max(during)
    return figures


@contextmanager
def stepping(subject: Subject, images: int) -> Iterator[list[float]]:
    """Seconds of the steps that a thread makes all the while."""
    times: list[float] = []
    stop = threading.Event()

    def steps() -> None:
        while not stop.is_set():
            run = EngineRun(subject, range(images), 10)
            for _ in range(10):
                started = time.perf_counter()
                run.step()
                times.append(time.perf_counter() - started)

    thread = threading.Thread(target=steps, name="steps")
    thread.start()
    try:
        yield times
    finally:
        stop.set()
        thread.join()
