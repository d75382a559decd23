"""Where the time goes: the benchmark's trace in a closed loop of 8, in this process, without HTTP.

python -m bench.profile [MAX_BATCH_SIZE]

Prints what the device did: the share of time outside calls, how well the rows were packed, seconds
by stage, and for every image side the rows that a step had and what a row cost.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import defaultdict

from bench.calls import Call, Curve, overhead, record
from bench.trace import make_trace
from sdbento.app import App
from sdbento.backend.local import LocalBackend
from sdbento.engine.trajectory import Stage
from sdbento.environment import load_settings
from sdbento.request.schema import GenerateRequest

CONCURRENCY = 8


async def closed_loop(app: App, requests: list[GenerateRequest]) -> float:
    waiting = requests[::-1]

    async def client() -> None:
        while waiting:
            await app.run(waiting.pop())

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CONCURRENCY)))
    return time.perf_counter() - started


def report(calls: list[Call], seconds: float) -> None:
    print(f"{seconds:.2f} s in all; {overhead([calls]):.1%} outside calls")
    print(f"packing: {Curve(calls).packing(calls):.1%} of perfect")
    for stage in Stage:
        chosen = [call for call in calls if call.stage == stage]
        print(f"{stage}: {len(chosen)} calls, {sum(call.seconds for call in chosen):.2f} s")
    by_side: dict[int, list[Call]] = defaultdict(list)
    for call in calls:
        if call.stage == Stage.STEP:
            by_side[call.side].append(call)
    for side, steps in sorted(by_side.items()):
        rows = sum(call.rows for call in steps)
        cost = 1000 * sum(call.seconds for call in steps) / rows
        print(f"side {side}: {rows / len(steps):.1f} rows a call, {cost:.1f} ms a row")


def main() -> None:
    max_batch_size = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    calls: list[Call] = []
    app = App(load_settings(sd_model="shapes", max_batch_size=max_batch_size))
    assert isinstance(app.backend, LocalBackend)
    record(app.backend.runner, calls.append)
    app.start()
    try:
        while not app.ready:
            time.sleep(0.05)
        requests = [GenerateRequest(**fields) for fields in make_trace()]
        asyncio.run(closed_loop(app, requests[:16]))
        calls.clear()
        seconds = asyncio.run(closed_loop(app, requests))
        report(calls, seconds)
    finally:
        app.close()


if __name__ == "__main__":
    main()
