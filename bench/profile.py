"""Where the time goes: the benchmark's trace in a closed loop of 8, in this process, without HTTP.

python -m bench.profile [MAX_BATCH_SIZE]

Prints what the engine's thread did: seconds by stage, seconds between plans, and for every image
side the rows a UNet call had and what a row cost.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import defaultdict
from dataclasses import dataclass

from bench.trace import make_trace
from sdbento.app import App
from sdbento.engine.trajectory import Launched, Stage, StepPlan
from sdbento.environment import load_settings
from sdbento.request.schema import GenerateRequest
from sdbento.runner.torch_runner import TorchRunner

CONCURRENCY = 8


@dataclass(frozen=True)
class Call:
    stage: Stage
    side: int
    rows: int
    seconds: float


class Recorder(TorchRunner):
    """The real runner; notes every plan."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def launch(self, plan: StepPlan) -> Launched:
        started = time.perf_counter()
        launched = super().launch(plan)
        seconds = time.perf_counter() - started
        self.calls.append(Call(plan.stage, 8 * plan.key.latent_width, plan.rows, seconds))
        return launched


async def closed_loop(app: App, requests: list[GenerateRequest]) -> float:
    waiting = requests[::-1]

    async def client() -> None:
        while waiting:
            await app.run(waiting.pop())

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CONCURRENCY)))
    return time.perf_counter() - started


def report(calls: list[Call], seconds: float) -> None:
    print(f"{seconds:.2f} s in all; {seconds - sum(c.seconds for c in calls):.2f} s between plans")
    for stage in Stage:
        chosen = [call for call in calls if call.stage is stage]
        print(f"{stage}: {len(chosen)} calls, {sum(call.seconds for call in chosen):.2f} s")
    by_side: dict[int, list[Call]] = defaultdict(list)
    for call in calls:
        if call.stage is Stage.STEP:
            by_side[call.side].append(call)
    for side, steps in sorted(by_side.items()):
        rows = sum(call.rows for call in steps)
        cost = 1000 * sum(call.seconds for call in steps) / rows
        print(f"side {side}: {rows / len(steps):.1f} rows a call, {cost:.1f} ms a row")


def main() -> None:
    max_batch_size = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    recorder = Recorder()
    app = App(load_settings(sd_model="shapes", max_batch_size=max_batch_size), recorder)
    app.start()
    try:
        while not app.ready:
            time.sleep(0.05)
        requests = [GenerateRequest(**fields) for fields in make_trace()]
        asyncio.run(closed_loop(app, requests[:16]))
        recorder.calls.clear()
        seconds = asyncio.run(closed_loop(app, requests))
        report(recorder.calls, seconds)
    finally:
        app.close()


if __name__ == "__main__":
    main()
