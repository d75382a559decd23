"""Requests: the engine in this process against stock pipeline calls in static batches.

A static batch is what a careful user of the stock pipeline makes: whenever the pipeline is free,
the oldest request and up to seven others that have its step count and sampler, for only those can
share a call. Both sides decode the images, too.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import mean, quantiles

from bench.calls import Call, overhead, record
from bench.gpu.bench import Bench
from bench.gpu.rows import Label
from bench.gpu.sections.graphs import new_graphs
from bench.gpu.subjects import FixedPrompts, Subject, build, stock_images, trajectory
from sdbento.engine.cost import CostModel
from sdbento.engine.handle import Handle
from sdbento.engine.loop import Engine
from sdbento.engine.planner import Planner
from sdbento.engine.trajectory import Stage
from sdbento.runner.graphs import Graphs, bucket
from sdbento.runner.torch_runner import TorchRunner

BATCH = 8
LOADS = (0.6, 0.9)
# Typical requests: few step counts and samplers, so that static batches can form.
STEPS = (4, 8, 20, 20, 30, 40)
SAMPLERS = ("Euler", "Euler a", "DPM++ 2M Karras")
MOST_REQUESTS = 64
STOCK = "stock in batches"
TIMEOUT = 3600.0


@dataclass(frozen=True)
class Request:
    seed: int
    steps: int
    sampler: str
    due: float = 0.0  # seconds after the start


@dataclass(frozen=True)
class Outcome:
    latencies: Sequence[float]
    seconds: float

    def figures(self) -> dict[str, Label]:
        percents = quantiles(self.latencies, n=100, method="inclusive")
        return {
            "images_per_s": len(self.latencies) / self.seconds,
            **{f"p{percent}_s": percents[percent - 1] for percent in (50, 95, 99)},
        }


def offline(bench: Bench, model: str) -> None:
    """All requests are there at the start; images a second, decoding included."""
    subject = build(model, bench)
    same, varied = alike(bench, subject), mixed(bench, subject)
    with serving(subject) as eager, serving(subject, new_graphs(bench)) as replaying:
        for requests, trace in ((same, "alike, Euler"), (varied, "mixed steps and samplers")):
            for engine, system in ((replaying, "engine, graph"), (None, STOCK)):
                all_at_once(bench, subject, engine, requests, trace, system)
        all_at_once(bench, subject, eager, same, "alike, Euler", "engine")


def best_offline(bench: Bench, subject: Subject, variant: str) -> None:
    """The same for equal requests, by the engine with captured steps."""
    with serving(subject, new_graphs(bench)) as engine:
        requests = alike(bench, subject)
        all_at_once(bench, subject, engine, requests, "alike, Euler", f"engine, {variant}")


def all_at_once(
    bench: Bench,
    subject: Subject,
    engine: Serving | None,
    requests: Sequence[Request],
    trace: str,
    system: str,
) -> None:
    labels: dict[str, Label] = {"requests": trace, "system": system, "count": len(requests)}
    with bench.part(5, **labels):
        warm_up(subject, engine)
        outcome = run_once(subject, engine, requests)
        what = f"{subject.name}, many requests at once"
        row_steps = sum(request.steps for request in requests)
        figures = {
            "images_per_s": len(requests) / outcome.seconds,
            "image_steps_per_s": row_steps / outcome.seconds,
            "seconds": outcome.seconds,
        }
        bench.row(figures, what=what, **labels)
        if engine is not None:
            engine.note_calls(bench, what=what, **labels)


def alike(bench: Bench, subject: Subject) -> list[Request]:
    return [Request(seed, subject.steps, "Euler") for seed in range(count_of(bench))]


def mixed(bench: Bench, subject: Subject) -> list[Request]:
    """As many steps in all, but other numbers of them, and three samplers."""
    rng, steps = random.Random(0), subject.steps
    spread = [rng.randint(-steps // 2, steps // 2) for _ in range(count_of(bench) // 2)]
    counts = [steps + change for pair in spread for change in (pair, -pair)]
    return [Request(i, max(1, n), SAMPLERS[i % 3]) for i, n in enumerate(counts)]


def count_of(bench: Bench) -> int:
    return 4 if bench.toy else 2 * BATCH


def online(bench: Bench, model: str) -> None:
    """Poisson arrivals at shares of what static batches can do on the same trace."""
    subject = build(model, bench)
    first = make_trace(4 if bench.toy else 24, bench.toy)
    with serving(subject, new_graphs(bench)) as engine:
        systems: dict[str, Serving | None] = {"engine, graph": engine, STOCK: None}
        for one in systems.values():
            warm_up(subject, one)
        capacity = 1.0
        for system, one in systems.items():
            labels: dict[str, Label] = {"load": "all at once", "system": system}
            with bench.part(5, **labels):
                outcome = run_once(subject, one, first)
                capacity = len(first) / outcome.seconds
                bench.row(outcome.figures(), what=model, count=len(first), **labels)
                if one is not None:
                    one.note_calls(bench, what=model, **labels)
        for load in LOADS:
            count = affordable(bench, capacity)
            trace = arriving(make_trace(count, bench.toy), load * capacity)
            for system, one in systems.items():
                labels = {"load": f"{load:.0%}", "system": system}
                with bench.part(5, **labels):
                    outcome = run_once(subject, one, trace)
                    bench.row(outcome.figures(), what=model, count=count, **labels)
                    if one is not None:
                        one.note_calls(bench, what=model, **labels)


def affordable(bench: Bench, capacity: float) -> int:
    """The number of requests per load that fit the time left, with a third to spare."""
    rounds = sum(2 / load for load in LOADS)
    most = 6 if bench.toy else MOST_REQUESTS
    return max(4, min(most, int(0.66 * bench.left() * capacity / rounds)))


def make_trace(count: int, toy: bool) -> list[Request]:
    rng = random.Random(1)
    steps = (2, 3, 5) if toy else STEPS
    return [Request(seed, rng.choice(steps), rng.choice(SAMPLERS)) for seed in range(count)]


def arriving(trace: Sequence[Request], rate: float) -> list[Request]:
    """As a Poisson process of `rate` requests a second."""
    rng, due, requests = random.Random(2), 0.0, []
    for request in trace:
        due += rng.expovariate(rate)
        requests.append(Request(request.seed, request.steps, request.sampler, due))
    return requests


@dataclass(frozen=True)
class Serving:
    """An engine, and the calls that its device was given."""

    engine: Engine
    calls: list[Call]

    def note_calls(self, bench: Bench, **labels: Label) -> None:
        """Where the time went since the last note."""
        calls, self.calls[:] = list(self.calls), []
        steps = [call for call in calls if call.stage == Stage.STEP]
        decodes = [call for call in calls if call.stage == Stage.DECODE]
        figures: dict[str, Label] = {
            "step_calls": len(steps),
            "rows_per_call": mean(call.rows for call in steps),
            "ms_per_step": 1000 * mean(call.seconds for call in steps),
            "decode_calls": len(decodes),
            "ms_per_decode": 1000 * mean(call.seconds for call in decodes),
            "outside_calls": overhead([calls]),
        }
        bench.row(figures, of="calls", **labels)


@contextmanager
def serving(subject: Subject, graphs: Graphs | None = None) -> Iterator[Serving]:
    cost = CostModel(computed_rows=None if graphs is None else bucket)
    runner, calls = TorchRunner(FixedPrompts(subject), graphs), list[Call]()
    record(runner, calls.append)
    engine = Engine(runner, Planner(BATCH, cost))
    engine.start()
    try:
        yield Serving(engine, calls)
    finally:
        engine.close(grace=0.0)


def warm_up(subject: Subject, engine: Serving | None) -> None:
    """Batches of every size: a server has captured their steps when it is asked for the first."""
    for count in range(BATCH, 0, -1):
        run_once(subject, engine, [Request(seed, 2, "Euler") for seed in range(count)])
    if engine is not None:
        engine.calls.clear()


def run_once(subject: Subject, engine: Serving | None, requests: Sequence[Request]) -> Outcome:
    """By the engine, or without one by the stock pipeline in static batches."""
    if engine is None:
        return in_batches(subject, requests)
    return by_engine(subject, engine.engine, requests)


def by_engine(subject: Subject, engine: Engine, requests: Sequence[Request]) -> Outcome:
    images = [trajectory(subject, one.seed, one.steps, one.sampler) for one in requests]
    ends: dict[int, float] = {}
    handles: list[Handle] = []
    lock = threading.Lock()
    started = time.monotonic()

    def note(number: int, _done: object) -> None:
        with lock:
            ends[number] = time.monotonic()

    for number, request in enumerate(requests):
        time.sleep(max(0.0, started + request.due - time.monotonic()))
        handle = engine.submit([images[number]], time.monotonic() + TIMEOUT)
        handle.done.add_done_callback(partial(note, number))
        handles.append(handle)
    for handle in handles:
        handle.done.result()
    while len(ends) < len(handles):  # the last callback may still run
        time.sleep(0.001)
    latencies = [ends[i] - started - request.due for i, request in enumerate(requests)]
    return Outcome(latencies, max(ends.values()) - started)


def in_batches(subject: Subject, requests: Sequence[Request]) -> Outcome:
    subject.stock.vae.enable_slicing()  # eight images at once would not fit
    started = time.monotonic()
    coming, waiting, latencies = list(requests), list[Request](), list[float]()
    while coming or waiting:
        now = time.monotonic() - started
        while coming and coming[0].due <= now:
            waiting.append(coming.pop(0))
        if not waiting:
            time.sleep(coming[0].due - now)
            continue
        batch = compatible(waiting)
        waiting = [request for request in waiting if request not in batch]
        seeds = [request.seed for request in batch]
        stock_images(subject, seeds, batch[0].steps, "pil", batch[0].sampler)
        now = time.monotonic() - started
        latencies += [now - request.due for request in batch]
    return Outcome(latencies, time.monotonic() - started)


def compatible(waiting: Sequence[Request]) -> list[Request]:
    oldest = waiting[0]
    return [r for r in waiting if (r.steps, r.sampler) == (oldest.steps, oldest.sampler)][:BATCH]
