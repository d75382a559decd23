"""Runs policies against loads, several seeds each, and writes Markdown tables of the means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, quantiles

from bench.simulate.curves import Curves
from bench.simulate.device import MakePolicy, Outcome, capacity, closed_loop, open_loop
from bench.simulate.fleet import COLD_START, Fleet, FleetOutcome
from bench.simulate.owners import HEAVIES, LIGHTS, TwoOwners
from bench.simulate.policies import POLICIES, OneAtATime, OneQueue, Ours
from bench.simulate.traces import BURST, MIXED, MIXES, Mix, Request, poisson

CLIENTS = 8
LOADS = (0.5, 0.8, 0.9, 0.95)
SOME_LOADS = (0.5, 0.95)
BUSY_WORKERS = 0.5  # of a fleet: how many one image at a time would keep busy

Run = Callable[[MakePolicy, int], Outcome]  # by policy and seed


@dataclass(frozen=True)
class Size:
    """Requests of each run, and seeds over which figures are averaged."""

    requests: int
    seeds: int


@dataclass(frozen=True)
class Figures:
    """Means over the seeds; seconds, requests a second, share of perfect packing."""

    p50: float
    p95: float
    p99: float
    worst: float
    throughput: float
    packing: float


def figures(run: Run, make: MakePolicy, seeds: int) -> Figures:
    outcomes = [run(make, seed) for seed in range(seeds)]
    return Figures(
        mean(o.percentile(50) for o in outcomes),
        mean(o.percentile(95) for o in outcomes),
        mean(o.percentile(99) for o in outcomes),
        mean(max(o.latencies) for o in outcomes),
        mean(o.throughput for o in outcomes),
        mean(o.packing.best / o.packing.seconds for o in outcomes),
    )


def loads(
    curves: Curves, mix: Mix, size: Size, shares: Sequence[float]
) -> Iterator[tuple[str, Run]]:
    """Open loops at shares of what one at a time can do, in bursts, and a closed loop."""

    def opened(share: float, burst: int) -> Run:
        def run(make: MakePolicy, seed: int) -> Outcome:
            requests = mix.draw(size.requests, curves.side, seed)
            rate = share * capacity(curves, requests)
            return open_loop(curves, make, poisson(requests, rate, seed, burst))

        return run

    def closed(make: MakePolicy, seed: int) -> Outcome:
        return closed_loop(curves, make, mix.draw(size.requests, curves.side, seed), CLIENTS)

    for share in shares:
        yield f"{share:.0%}", opened(share, 1)
    yield f"80%, bursts of {BURST}", opened(0.8, BURST)
    yield f"closed, {CLIENTS} clients", closed


def in_full(curves: Curves, size: Size) -> Iterator[str]:
    """All policies on the benchmark's mix."""
    yield f"{MIXED.name}; {size.requests} requests, {size.seeds} seeds:\n"
    yield "| load | policy | p50 s | p95 s | p99 s | worst s | images/s | packing |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for load, run in loads(curves, MIXED, size, LOADS):
        for policy in POLICIES:
            yield f"| {load} | {policy.name} | {_cells(figures(run, policy, size.seeds))} |"


def ratios(curves: Curves, size: Size) -> Iterator[str]:
    """What sdbento makes of other mixes, as multiples of one at a time."""
    yield "sdbento / one at a time:\n"
    yield "| requests | load | p50 | p95 | p99 | worst | images/s |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for mix in MIXES:
        for load, run in loads(curves, mix, size, SOME_LOADS):
            one, ours = (figures(run, policy, size.seeds) for policy in (OneAtATime, Ours))
            parts = [
                getattr(ours, name) / getattr(one, name)
                for name in ("p50", "p95", "p99", "worst", "throughput")
            ]
            yield f"| {mix.name} | {load} | {' | '.join(f'{part:.2f}' for part in parts)} |"


def own_trace(curves: Curves, trace: list[Request]) -> Iterator[str]:
    """All policies on requests that arrive as a file says."""
    yield f"{len(trace)} requests, {_load(curves, trace)}:\n"
    yield "| policy | p50 s | p95 s | p99 s | worst s | images/s | packing |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for policy in POLICIES:
        made = figures(lambda make, _: open_loop(curves, make, trace), policy, seeds=1)
        yield f"| {policy.name} | {_cells(made)} |"


def fleet(curves: Curves, requests: int, most: int) -> Iterator[str]:
    """Workers that come and go with the load; nobody is there at the start."""
    drawn = MIXED.draw(requests, curves.side, seed=0)
    rate = BUSY_WORKERS * most * capacity(curves, drawn[:1000])
    trace = poisson(drawn, rate, seed=0)
    yield f"{requests} requests at {rate:.3g} a second, {most} workers at most;"
    yield f"a cold start takes {COLD_START:g} s, the cost is in worker seconds an image:\n"
    yield "| policy | requests a worker | workers | p50 s | p95 s | p99 s | cost |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for policy, together in ((OneAtATime, 1), (Ours, 2), (Ours, 4), (Ours, 8)):
        made = Fleet(curves, policy, together, most).run(trace)
        yield f"| {policy.name} | {together} | {_fleet_cells(made)} |"


def owners(curves: Curves, size: Size) -> Iterator[str]:
    """What an owner who asks now and then waits beside one who has many images waiting."""
    yield f"{MIXED.name} of the heavy owner, {size.requests} images, {size.seeds} seeds;"
    yield "how long requests of the light owner take, as a multiple of one alone:\n"
    yield "| heavy owner | light owner | policy | p50 | p99 | images/s | packing |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for heavy in HEAVIES:
        for light in LIGHTS:
            for policy in (OneQueue, Ours):
                runs = [
                    TwoOwners(curves, policy, heavy, light, size.requests, seed).run()
                    for seed in range(size.seeds)
                ]
                cells = _owners_cells(runs)
                yield f"| {heavy.name} | {light.name} | {policy.name} | {cells} |"


def _cells(made: Figures) -> str:
    seconds = (made.p50, made.p95, made.p99, made.worst, made.throughput)
    return " | ".join([*(f"{value:.2f}" for value in seconds), f"{made.packing:.0%}"])


def _fleet_cells(made: FleetOutcome) -> str:
    outcome = made.outcome
    percentiles = [f"{outcome.percentile(percent):.2f}" for percent in (50, 95, 99)]
    cost = made.worker_seconds / len(outcome.latencies)
    return " | ".join([str(made.most_workers), *percentiles, f"{cost:.2f}"])


def _owners_cells(runs: list[tuple[list[float], Outcome]]) -> str:
    waits = quantiles([wait for took, _ in runs for wait in took], n=100, method="inclusive")
    throughput = mean(outcome.throughput for _, outcome in runs)
    packing = mean(o.packing.best / o.packing.seconds for _, o in runs)
    return f"{waits[49]:.1f} | {waits[98]:.1f} | {throughput:.2f} | {packing:.0%}"


def _load(curves: Curves, trace: list[Request]) -> str:
    """The rate of arrival as a share of what one at a time can do."""
    span = trace[-1].at - trace[0].at
    if not span:
        return "all at once"
    return f"{len(trace) / span / capacity(curves, trace):.0%} of what one at a time can do"
