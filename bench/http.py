"""`make bench`: one trace over HTTP to (a) one at a time, (b) BentoML's batching, (c) sdbento.

Closed loop at concurrency 8, then open loop at 60% and 90% of what (a) could do. The three take
turns, so that a machine that slows down slows all of them. Before that, one image alone against
the stock pipeline (`bench.alone`). Prints a table and writes it into docs/performance.md between
its markers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from bench import alone
from bench.ideal import Costs, ideal_seconds, measure
from bench.load import Outcome, Send, closed_loop, combined, open_loop
from bench.trace import make_trace
from sdbento.catalog.lookup import Catalog
from sdbento.environment import load_settings
from sdbento.malloc import keep_freed_memory
from sdbento.models import weights
from sdbento.models.pipeline import Pipeline
from tests.support.server import Server, serving

CONCURRENCY = 8
CLOSED_ROUNDS = 2
LOADS = (0.6, 0.9)
REPORT = Path(__file__).parent.parent / "docs" / "performance.md"


async def send_plain(session: httpx.AsyncClient, request: dict[str, Any]) -> httpx.Response:
    return await session.post("/txt2img", json=request)


async def send_batchable(session: httpx.AsyncClient, request: dict[str, Any]) -> httpx.Response:
    return await session.post("/txt2img", json={"requests": [request]})


@dataclass(frozen=True)
class System:
    letter: str
    name: str
    target: str
    send: Send


SYSTEMS = (
    System("a", "diffusers, one request at a time", "bench.baselines:OneByOne", send_plain),
    System("b", "diffusers, BentoML batchable", "bench.baselines:Batchable", send_batchable),
    System("c", "sdbento", "service:StableDiffusion", send_plain),
)


def run_all(trace: Sequence[dict[str, Any]], max_batch_size: int) -> dict[str, dict[str, Outcome]]:
    """Outcomes by system and load. All servers are up; only the one whose turn it is works."""
    with ExitStack() as stack:
        servers = {
            system.letter: stack.enter_context(start(system, max_batch_size)) for system in SYSTEMS
        }

        def run(system: System, requests: Sequence[dict[str, Any]], rate: float | None) -> Outcome:
            url = servers[system.letter].url
            if rate is None:
                return asyncio.run(closed_loop(url, system.send, requests, CONCURRENCY))
            return asyncio.run(open_loop(url, system.send, requests, rate))

        for system in SYSTEMS:
            # Lazy initialisation is done; the batchable service also learns its batch size.
            run(system, trace[:16], None)
        rounds = [[run(system, trace, None) for system in SYSTEMS] for _ in range(CLOSED_ROUNDS)]
        results = {
            system.letter: {"closed": combined(outcomes)}
            for system, outcomes in zip(SYSTEMS, zip(*rounds, strict=True), strict=True)
        }
        print("closed loop done", flush=True)
        capacity = results["a"]["closed"].throughput
        for load in LOADS:
            for system in SYSTEMS:
                results[system.letter][f"{load:.0%}"] = run(system, trace, load * capacity)
            print(f"{load:.0%} done", flush=True)
    return results


@contextmanager
def start(system: System, max_batch_size: int) -> Iterator[Server]:
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(
            Path(folder),
            target=system.target,
            BENCH_MODEL=str(alone.SHAPES),
            MAX_BATCH_SIZE=str(max_batch_size),
        ) as server,
    ):
        server.wait_until_ready()
        yield server


def measure_costs(trace: Sequence[dict[str, Any]]) -> tuple[dict[int, Costs], float]:
    """The cost curves at the trace's sizes and the ideal time of the trace."""
    settings = load_settings(sd_model="shapes")
    pipeline = weights.load(Catalog(settings).resolve("shapes"), settings)
    assert isinstance(pipeline, Pipeline)
    costs = {side: measure(pipeline, side) for side in {r["width"] for r in trace}}
    return costs, ideal_seconds(pipeline, trace, costs)


def report(
    results: dict[str, dict[str, Outcome]],
    costs: dict[int, Costs],
    ideal: float,
    one: alone.Alone,
    num_requests: int,
    max_batch_size: int,
) -> str:
    lines = [
        f"Hardware: {hardware()}. Model `shapes`, {num_requests} requests, "
        f"sdbento with MAX_BATCH_SIZE={max_batch_size}.",
        "",
        "| load | system | requests/s | p50 s | p95 s | p99 s | failed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for load in results["a"]:
        for system in SYSTEMS:
            outcome = results[system.letter][load]
            p50, p95, p99 = (outcome.percentile(p) for p in (50, 95, 99))
            lines.append(
                f"| {load} | ({system.letter}) {system.name} | {outcome.throughput:.2f} | "
                f"{p50:.2f} | {p95:.2f} | {p99:.2f} | {outcome.num_failed} |"
            )
    closed = {letter: outcomes["closed"].throughput for letter, outcomes in results.items()}
    lines += ["", "| figure | value | aim |", "| --- | --- | --- |"]
    lines.append(f"| throughput (c) / (a), closed loop | {closed['c'] / closed['a']:.2f} | 1.6 |")
    lines.append(f"| throughput (c) / (b), closed loop | {closed['c'] / closed['b']:.2f} | 1.4 |")
    share = CLOSED_ROUNDS * ideal / results["c"]["closed"].seconds
    lines.append(f"| share of the ideal of (c), closed loop | {share:.0%} | 90% |")
    for load, aim in zip(list(results["a"])[1:], ("0.6", "0.4"), strict=True):
        ratio = results["c"][load].percentile(50) / results["a"][load].percentile(50)
        lines.append(f"| p50 (c) / (a) at {load} load | {ratio:.2f} | {aim} |")
    return "\n".join([*lines, "", *alone.report(one), "", *cost_lines(costs)])


def cost_lines(costs: dict[int, Costs]) -> list[str]:
    rows = list(next(iter(costs.values())).unet)
    lines = [
        "Milliseconds a row of one UNet call, by rows, and of the VAE an image:",
        "",
        "| side | " + " | ".join(str(r) for r in rows) + " | VAE |",
        "| --- " * (len(rows) + 2) + "|",
    ]
    for side, cost in sorted(costs.items()):
        figures = [f"{1000 * seconds / r:.1f}" for r, seconds in cost.unet.items()]
        lines.append(f"| {side} | " + " | ".join(figures) + f" | {1000 * cost.vae:.0f} |")
    return lines


def hardware() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = names[0] if names else platform.processor()
    return f"{os.cpu_count()} CPU cores ({name}), torch {torch.__version__}"


def write_report(text: str) -> None:
    """Replace the part between the markers; everything around it is written by hand."""
    old = REPORT.read_text()
    pattern = r"(<!-- bench:begin[^\n]*-->\n).*?(<!-- bench:end -->)"
    REPORT.write_text(re.sub(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", old, flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-batch-size", type=int, default=16)
    parser.add_argument("--dry-run", action="store_true", help="do not write the report")
    options = parser.parse_args()
    trace = make_trace(num_requests=options.requests)
    keep_freed_memory()
    one = alone.measure()
    results = run_all(trace, options.max_batch_size)
    costs, ideal = measure_costs(trace)
    text = report(results, costs, ideal, one, len(trace), options.max_batch_size)
    print(text)
    if not options.dry_run:
        write_report(text)


if __name__ == "__main__":
    main()
