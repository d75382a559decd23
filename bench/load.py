"""Send a trace to a server, closed loop or open loop, and sum up the answers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import httpx

Send = Callable[[httpx.AsyncClient, dict[str, Any]], Awaitable[httpx.Response]]


@dataclass(frozen=True)
class Outcome:
    """Latencies in seconds, failed requests, and seconds from the first send to the last answer."""

    latencies: list[float]
    num_failed: int
    seconds: float

    @property
    def throughput(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, percent: int) -> float:
        return quantiles(self.latencies, n=100, method="inclusive")[percent - 1]


def combined(outcomes: Sequence[Outcome]) -> Outcome:
    """The sum of runs one after the other."""
    return Outcome(
        [latency for outcome in outcomes for latency in outcome.latencies],
        sum(outcome.num_failed for outcome in outcomes),
        sum(outcome.seconds for outcome in outcomes),
    )


async def closed_loop(
    url: str, send: Send, trace: Sequence[dict[str, Any]], concurrency: int
) -> Outcome:
    """`concurrency` clients; each sends its next request when it has the answer to its last."""
    waiting = list(reversed(trace))
    latencies: list[float] = []
    failed = 0

    async def client(session: httpx.AsyncClient) -> None:
        nonlocal failed
        while waiting:
            seconds, ok = await _timed(session, send, waiting.pop())
            latencies.append(seconds)
            failed += not ok

    async with _session(url) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(concurrency)))
        return Outcome(latencies, failed, time.perf_counter() - started)


async def open_loop(
    url: str, send: Send, trace: Sequence[dict[str, Any]], rate: float, seed: int = 1
) -> Outcome:
    """Poisson arrivals at `rate` requests a second, whether or not answers keep up."""
    rng = random.Random(seed)

    async with _session(url) as session:
        started = time.perf_counter()
        tasks = []
        due = started
        for request in trace:
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(_timed(session, send, request)))
        results = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - started
    return Outcome([taken for taken, _ in results], sum(not ok for _, ok in results), seconds)


def _session(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, timeout=1800.0, limits=limits, trust_env=False)


async def _timed(
    session: httpx.AsyncClient, send: Send, request: dict[str, Any]
) -> tuple[float, bool]:
    started = time.perf_counter()
    response = await send(session, request)
    return time.perf_counter() - started, response.status_code == 200
