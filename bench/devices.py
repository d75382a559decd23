"""Two devices behind one port: `python -m bench.devices`.

One trace over HTTP to (a) two of BentoML's workers, over which the kernel spreads connections, and
(b) sdbento with SDBENTO_GPUS, which gives each request to an engine process. A device is a thread
of the CPU. Closed loop at concurrency 8, then open loop at parts of what (a) could do. The two take
turns, so that a machine that slows down slows both. Clients keep their connections, as most do.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.hardware import hardware
from bench.http import CONCURRENCY, send_plain
from bench.load import Outcome, closed_loop, combined, open_loop
from bench.trace import make_trace
from tests.support.server import Server, serving

DEVICES = 2
LOADS = (0.5, 0.8)
ROUNDS = 3


SYSTEMS = (
    ("BentoML's workers", "bench.workers:StableDiffusion", ""),
    ("sdbento's engines", "service:StableDiffusion", f"cpu:{DEVICES}"),
)


@contextmanager
def start(folder: Path, name: str, target: str, gpus: str) -> Iterator[Server]:
    own = folder / name
    own.mkdir()
    with serving(
        own,
        target=target,
        OMP_NUM_THREADS="1",
        BENCH_WORKERS=str(DEVICES),
        SDBENTO_GPUS=gpus,
    ) as server:
        server.wait_until_ready()
        yield server


def measure(num_requests: int, rounds: int) -> Iterator[tuple[str, list[Outcome]]]:
    """The outcomes of both systems, load by load."""
    trace = make_trace(num_requests=num_requests)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = [stack.enter_context(start(folder, *system)).url for system in SYSTEMS]

        def run(url: str, rate: float | None, seed: int) -> Outcome:
            if rate is None:
                return asyncio.run(closed_loop(url, send_plain, trace, CONCURRENCY))
            return asyncio.run(open_loop(url, send_plain, trace, rate, seed))

        def in_turn(rate: float | None) -> list[Outcome]:
            done = [[run(url, rate, seed) for url in urls] for seed in range(rounds)]
            return [combined(outcomes) for outcomes in zip(*done, strict=True)]

        for url in urls:
            run(url, None, 0)  # lazy initialisation is done
        yield "closed loop", (closed := in_turn(None))
        for load in LOADS:
            yield f"{load:.0%}", in_turn(load * closed[0].throughput)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=64, help="requests of a round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    print(
        f"Hardware: {hardware()}. Model `shapes`, {options.rounds} x {options.requests} requests."
    )
    print("\n| load | system | requests/s | p50 s | p95 s | p99 s | failed |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for load, outcomes in measure(options.requests, options.rounds):
        for (name, *_), outcome in zip(SYSTEMS, outcomes, strict=True):
            times = " | ".join(f"{outcome.percentile(p):.2f}" for p in (50, 95, 99))
            print(
                f"| {load} | {name} | {outcome.throughput:.2f} | {times} | {outcome.num_failed} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
