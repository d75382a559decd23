"""`make bench`: one trace over HTTP to (a) one at a time, (b) BentoML's batching, (c) sdbento.

Closed loop at concurrency 8, then open loop at 60% and 90% of what (a) could do. The three take
turns, so that a machine that slows down slows all of them. Before that, one image alone against
the stock pipeline (`bench.alone`). What is said of packing and of the time outside calls comes from
the calls that sdbento made meanwhile (`bench.calls`). Prints a table and writes it into
docs/performance.md between its markers.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench import alone
from bench.calls import Call, CallLog, Curve, overhead
from bench.hardware import hardware
from bench.load import Outcome, Send, closed_loop, combined, open_loop
from bench.trace import make_trace
from sdbento.process.malloc import keep_freed_memory
from tests.support.server import Server, serving
from tools.marked import replaced

CONCURRENCY = 8
CLOSED_ROUNDS = 2
LOADS = (0.6, 0.9)
P50_AIMS = ("1.0", "1.0", "0.5")  # closed loop, then LOADS
ROWS = (1, 2, 4, 6, 8, 10, 12, 14, 16)
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
    System("c", "sdbento", "bench.recorded:StableDiffusion", send_plain),
)


@dataclass(frozen=True)
class Results:
    """Outcomes by system and load, and sdbento's calls: all, and those of each closed loop."""

    outcomes: dict[str, dict[str, Outcome]]
    calls: list[Call]
    closed_calls: list[list[Call]]


def run_all(trace: Sequence[dict[str, Any]], max_batch_size: int) -> Results:
    """All servers are up; only the one whose turn it is works."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = CallLog(folder / "calls")
        servers = {
            system.letter: stack.enter_context(start(system, max_batch_size, folder))
            for system in SYSTEMS
        }

        def run(system: System, requests: Sequence[dict[str, Any]], rate: float | None) -> Outcome:
            url = servers[system.letter].url
            if rate is None:
                return asyncio.run(closed_loop(url, system.send, requests, CONCURRENCY))
            return asyncio.run(open_loop(url, system.send, requests, rate))

        for system in SYSTEMS:
            # Lazy initialisation is done; the batchable service also learns its batch size.
            run(system, trace[:16], None)
        log.new()  # and forgotten
        rounds, closed_calls = [], []
        for _ in range(CLOSED_ROUNDS):
            rounds.append([run(system, trace, None) for system in SYSTEMS])
            closed_calls.append(log.new())
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
        calls = [call for of_one in closed_calls for call in of_one] + log.new()
    return Results(results, calls, closed_calls)


@contextmanager
def start(system: System, max_batch_size: int, folder: Path) -> Iterator[Server]:
    own = folder / system.letter
    own.mkdir()
    with serving(
        own,
        target=system.target,
        BENCH_MODEL=str(alone.SHAPES),
        BENCH_CALLS=str(folder / "calls"),
        MAX_BATCH_SIZE=str(max_batch_size),
    ) as server:
        server.wait_until_ready()
        yield server


def report(results: Results, one: alone.Alone, num_requests: int, max_batch_size: int) -> str:
    outcomes = results.outcomes
    lines = [
        f"Hardware: {hardware()}. Model `shapes`, {num_requests} requests, "
        f"sdbento with MAX_BATCH_SIZE={max_batch_size}.",
        "",
        "| load | system | requests/s | p50 s | p95 s | p99 s | failed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for load in outcomes["a"]:
        for system in SYSTEMS:
            outcome = outcomes[system.letter][load]
            p50, p95, p99 = (outcome.percentile(p) for p in (50, 95, 99))
            lines.append(
                f"| {load} | ({system.letter}) {system.name} | {outcome.throughput:.2f} | "
                f"{p50:.2f} | {p95:.2f} | {p99:.2f} | {outcome.num_failed} |"
            )
    curve = Curve(results.calls)
    lines += ["", *figure_lines(results, curve), "", *alone.report(one), "", *cost_lines(curve)]
    return "\n".join(lines)


def figure_lines(results: Results, curve: Curve) -> list[str]:
    outcomes = results.outcomes
    lines = ["| figure | value | aim |", "| --- | --- | --- |"]
    closed = {letter: by_load["closed"].throughput for letter, by_load in outcomes.items()}
    for other, aim in (("a", "1.6"), ("b", "1.4")):
        ratio = closed["c"] / closed[other]
        lines.append(f"| throughput (c) / ({other}), closed loop | {ratio:.2f} | {aim} |")
    packing = curve.packing(call for calls in results.closed_calls for call in calls)
    lines.append(f"| packing of (c), closed loop | {packing:.0%} | 97% |")
    outside = overhead(results.closed_calls)
    lines.append(f"| time outside calls of (c), closed loop | {outside:.1%} | |")
    for load, p50_aim in zip(outcomes["a"], P50_AIMS, strict=True):
        one, ours = outcomes["a"][load], outcomes["c"][load]
        for percent, aim in ((50, p50_aim), (99, "1.0")):
            ratio = ours.percentile(percent) / one.percentile(percent)
            lines.append(f"| p{percent} (c) / (a), {load} | {ratio:.2f} | {aim} |")
    return lines


def cost_lines(curve: Curve) -> list[str]:
    lines = [
        "Milliseconds a row of one step, by rows, as the server's own calls took them (medians):",
        "",
        "| size, text chunks | " + " | ".join(str(rows) for rows in ROWS) + " |",
        "| --- " * (len(ROWS) + 1) + "|",
    ]
    for key, by_rows in sorted(curve.by_key.items()):
        cells = [f"{1000 * by_rows[r] / r:.1f}" if r in by_rows else "" for r in ROWS]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return lines


def write_report(text: str) -> None:
    REPORT.write_text(replaced(REPORT.read_text(encoding="utf-8"), "bench", text), encoding="utf-8")


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
    text = report(results, one, len(trace), options.max_batch_size)
    print(text)
    if not options.dry_run:
        write_report(text)


if __name__ == "__main__":
    main()
