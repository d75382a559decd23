"""One image alone: the stock pipeline, this engine and this server, one after the other.

Each is a process of its own that waits while the others work. In every round each makes the same
image, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.support.server import ROOT, serving

SHAPES = ROOT / "sdbento" / "bundled" / "shapes"
ROUNDS = 30
REQUEST: dict[str, Any] = {
    "prompt": "a large red circle on a blue background",
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
    "scheduler": "DDIM",
    "width": 128,
    "height": 128,
}


@dataclass(frozen=True)
class Alone:
    """Seconds an image, median of all rounds; the ratios are medians of the rounds' own."""

    stock: float
    engine: float
    http: float
    engine_ratio: float
    http_ratio: float


def measure(rounds: int = ROUNDS) -> Alone:
    with ExitStack() as stack:
        makers = [
            stack.enter_context(process("stock")),
            stack.enter_context(process("engine")),
            stack.enter_context(server()),
        ]
        for make in makers * 3:  # for lazy initialisation
            make(0)
        seconds = [[make(seed) for make in makers] for seed in range(rounds)]
    stock, engine, http = (median(column) for column in zip(*seconds, strict=True))
    return Alone(
        stock,
        engine,
        http,
        engine_ratio=median(row[1] / row[0] for row in seconds),
        http_ratio=median(row[2] / row[0] for row in seconds),
    )


def report(alone: Alone) -> list[str]:
    """Lines of a Markdown table."""
    return [
        f"One image alone, {REQUEST['num_inference_steps']} guided steps at "
        f"{REQUEST['width']}x{REQUEST['height']}, each in a process of its own, in turn:",
        "",
        "| system | ms | of stock | aim |",
        "| --- | --- | --- | --- |",
        f"| diffusers pipeline | {1000 * alone.stock:.0f} | | |",
        f"| sdbento's engine | {1000 * alone.engine:.0f} | {alone.engine_ratio:.2f} | 1.02 |",
        f"| sdbento over HTTP | {1000 * alone.http:.0f} | {alone.http_ratio:.2f} | 1.10 |",
    ]


@contextmanager
def process(kind: str) -> Iterator[Callable[[int], float]]:
    """A child of this program: it reads seeds and prints the seconds that each image took."""
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.alone", "--child", kind],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdin is not None and child.stdout is not None
    seeds, answers = child.stdin, child.stdout

    def make(seed: int) -> float:
        print(seed, file=seeds, flush=True)
        return float(answers.readline())

    try:
        yield make
    finally:
        seeds.close()
        child.wait()


@contextmanager
def server() -> Iterator[Callable[[int], float]]:
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as running:
        running.wait_until_ready()

        def make(seed: int) -> float:
            started = time.perf_counter()
            response = running.client.post("/txt2img", json={**REQUEST, "seed": seed})
            response.raise_for_status()
            return time.perf_counter() - started

        yield make


def answer_seeds(make: Callable[[int], Any]) -> None:
    for line in sys.stdin:
        started = time.perf_counter()
        make(int(line))
        print(time.perf_counter() - started, flush=True)


def run_stock() -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    from sdbento.samplers.scheduler import SamplerSpec, build_scheduler

    pipe = StableDiffusionPipeline.from_pretrained(SHAPES, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    name, given = REQUEST["scheduler"], {k: v for k, v in REQUEST.items() if k != "scheduler"}
    pipe.scheduler = build_scheduler(SamplerSpec(name), dict(pipe.scheduler.config))
    gc.freeze()  # as `without_collector` does for the engine
    answer_seeds(lambda seed: pipe(**given, generator=torch.Generator().manual_seed(seed)))


def run_engine() -> None:
    from sdbento.process.heavy_imports import without_collector

    with without_collector():
        from sdbento.app import App
        from sdbento.environment import load_settings
        from sdbento.request.schema import GenerateRequest

    app = App(load_settings(sd_model="shapes"))
    app.start()
    try:
        with asyncio.Runner() as runner:
            answer_seeds(lambda s: runner.run(app.run(GenerateRequest(**REQUEST, seed=s))))
    finally:
        app.close()


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--child", choices=["stock", "engine"], help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.child is None:
        print("\n".join(report(measure(options.rounds))))
        return
    from sdbento.process.malloc import keep_freed_memory

    keep_freed_memory()  # the stock pipeline imports it too
    {"stock": run_stock, "engine": run_engine}[options.child]()


if __name__ == "__main__":
    main()
