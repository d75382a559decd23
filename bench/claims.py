"""How many jobs a second one PostgreSQL hands out: `python -m bench.claims`.

Workers that compute nothing share one database, each with a store of its own, as every server has
one. First all of them add jobs; then they claim and end these, until the queue is empty: so many
jobs a claim as are given by --per-claim, in turn. Seconds are those of single claims.

The database is a fresh one of this machine's PostgreSQL, whose commits are on the disk before they
count. It shares the machine with the workers, which take most of the CPU: with 2 cores the figures
say what is possible at least.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import quantiles

from sdbento.jobs.results import Results
from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.store.room import Limits
from sdbento.jobs.table import NewJob
from tests.support.postgres import new_database, postgres

HOUR = 3_600_000  # ms
OWNERS = 20
INPUT = json.dumps({"prompt": "a lighthouse at dusk", "num_inference_steps": 30, "seed": 42})
ROOM = Limits(max_unfinished=10**7, max_finished=10**7)
CONNECTIONS = 400  # that the database takes


@dataclass(frozen=True)
class Done:
    """What a worker has done: so many jobs, and the seconds of each of its calls."""

    jobs: int
    seconds: list[float]


Work = Callable[[JobStore, str], Done]


def add(store: JobStore, worker: str, *, jobs: int) -> Done:
    seconds: list[float] = []
    for i in range(jobs):
        job = NewJob(f"{worker}-{i}", INPUT, HOUR, 10 * HOUR, HOUR, key_name=f"key-{i % OWNERS}")
        start = time.perf_counter()
        store.add(job)
        seconds.append(time.perf_counter() - start)
    return Done(jobs, seconds)


def claim(store: JobStore, _: str, *, per_claim: int) -> Done:
    """Claim and end jobs until there are no more."""
    jobs, seconds = 0, list[float]()
    while True:
        start = time.perf_counter()
        claimed = store.claim(per_claim)
        if not claimed:
            return Done(jobs, seconds)
        seconds.append(time.perf_counter() - start)
        for job in claimed:
            store.fail(job, "computes nothing")
        jobs += len(claimed)


def in_process(work: Work, url: str, folder: str, workers: int) -> list[Done]:
    """The share of one process: its workers are threads."""
    with ExitStack() as stack, ThreadPoolExecutor(workers) as pool:
        names = [f"{os.getpid()}-{i}" for i in range(workers)]
        results = Results(Path(folder) / "results")
        stores = [
            stack.enter_context(
                closing(JobStore(Path(folder) / name, url, results=results, limits=ROOM))
            )
            for name in names
        ]
        return list(pool.map(work, stores, names))


def measure(what: str, work: Work, url: str, folder: str, options: argparse.Namespace) -> None:
    each = options.workers // options.processes
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, context) as pool:
        # The processes are there, and have imported everything.
        list(pool.map(time.sleep, [1.0] * options.processes))
        start = time.perf_counter()
        shares = [
            pool.submit(in_process, work, url, folder, each) for _ in range(options.processes)
        ]
        done = list(chain.from_iterable(share.result() for share in shares))
        taken = time.perf_counter() - start
    jobs, seconds = sum(one.jobs for one in done), [s for one in done for s in one.seconds]
    cuts = quantiles(seconds, n=20)
    print(
        f"| {what} | {jobs / taken:.0f} | {len(seconds) / taken:.0f} | {cuts[9] * 1000:.1f} "
        f"| {cuts[18] * 1000:.1f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=6400)
    parser.add_argument("--per-claim", type=int, nargs="*", default=[1, 8])
    options = parser.parse_args()
    print(f"{options.workers} workers in {options.processes} processes, {options.jobs} jobs\n")
    print("| | jobs a second | calls a second | a call, ms, in the middle | 95% |")
    print("| --- | --- | --- | --- | --- |")
    settings = f"-c max_connections={CONNECTIONS}"
    with tempfile.TemporaryDirectory() as folder, postgres(settings) as server:
        for per_claim in options.per_claim:
            url = new_database(server)
            fill = partial(add, jobs=options.jobs // options.workers)
            measure("add", fill, url, folder, options)
            what = f"claim {per_claim} and end"
            measure(what, partial(claim, per_claim=per_claim), url, folder, options)


if __name__ == "__main__":
    main()
