"""A runner whose images can be computed by hand, for planner, engine and HTTP tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any, cast

from PIL import Image

from sdbento.engine.inputs import FromNoise, PassInputs, SizeConditioning
from sdbento.engine.trajectory import (
    BatchKey,
    Launched,
    Pass,
    Stage,
    StepPlan,
    StepResult,
    Trajectory,
)
from sdbento.errors import SDBentoError

SQUARE = SizeConditioning((64, 64), (0, 0), (64, 64))


def make_trajectory(
    num_steps: int = 4,
    *,
    rows: int = 2,
    guided_steps: range | None = None,
    seed: int = 0,
    model: str = "a",
    side: int = 8,
    deep_cache_interval: int = 1,
    owner: str | None = None,
    submitted: float = 0.0,
    deadline: float = inf,
) -> Trajectory:
    nothing: Any = None  # tables and pipelines are for the real runner
    inputs = PassInputs((), (), 7.5, 0.0, nothing, SQUARE, SQUARE, FromNoise())
    guided = range(num_steps if rows == 2 else 0) if guided_steps is None else guided_steps
    key = BatchKey(model, side, side)
    interval = deep_cache_interval
    one = Pass(key, num_steps, guided, inputs, nothing, deep_cache_interval=interval)
    return Trajectory((one,), seed, owner=owner, submitted=submitted, deadline=deadline)


def chained(first: Trajectory, second: Trajectory, *, decodes: bool) -> Trajectory:
    """`first`, followed by the pass of `second`; `decodes`: by way of an image, else of latents."""
    first.passes = (replace(first.current, decodes=decodes), second.current)
    return first


def expected_pixel(seed: int, num_steps: int) -> tuple[int, int, int]:
    """The pixel that FakeRunner makes: it depends only on seed and steps of the last pass."""
    return seed % 256, num_steps % 256, (seed * 7 + num_steps) % 256


class FakeRunner:
    """State is a count of steps; the image is one pixel. Records every plan it launched.

    A plan raises, with no effect, if `fails` is true for any of its trajectories. Launching is
    computing, as on a CPU, and takes `seconds`.
    """

    def __init__(
        self,
        fails: Callable[[Trajectory], SDBentoError | Exception | None] = lambda _: None,
        seconds: float = 0.0,
    ) -> None:
        self.plans: list[StepPlan] = []
        self.seconds = seconds
        self._fails = fails

    def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        for trajectory in plan.trajectories:
            if (error := self._fails(trajectory)) is not None:
                raise error
        self.plans.append(plan)
        self.compute()
        for trajectory in plan.trajectories:
            self._advance(plan.stage, trajectory)
        return self.launched(plan)

    def compute(self) -> None:
        if self.seconds:
            time.sleep(self.seconds)

    def launched(self, plan: StepPlan) -> Launched:
        return FakeLaunched(plan, StepResult(self.seconds or 0.001))

    def measure(self, *_: object, capture: bool = False) -> float:
        return self.seconds or 0.001

    def measure_decode(self, *_: object) -> float:
        return self.seconds or 0.001

    def _advance(self, stage: Stage, trajectory: Trajectory) -> None:
        state: Any = trajectory.state
        if stage is Stage.PREPARE:
            trajectory.state, trajectory.previous = cast(Any, 0), None
        elif stage is Stage.STEP:
            trajectory.state = state + 1


class FakeLaunched:
    """A plan that is done at once; its images are there once somebody has waited."""

    done = True

    def __init__(self, plan: StepPlan, result: StepResult) -> None:
        self._plan = plan
        self._result = result
        self._states = [cast(Any, trajectory.state) for trajectory in plan.trajectories]

    def wait(self) -> StepResult:
        for trajectory, state in zip(self._plan.trajectories, self._states, strict=True):
            if self._plan.stage is Stage.DECODE and trajectory not in self._result.failures:
                trajectory.image = Image.new("RGB", (1, 1), expected_pixel(trajectory.seed, state))
        return self._result


class FakeDevice(FakeRunner):
    """As a GPU: computes one plan after the other, beside the thread that launches them.

    `most`: plans that were under way at once; `breaks`: whether the device reports an error once it
    has done a plan.
    """

    def __init__(
        self,
        fails: Callable[[Trajectory], SDBentoError | Exception | None] = lambda _: None,
        seconds: float = 0.002,
        breaks: Callable[[StepPlan], Exception | None] = lambda _: None,
    ) -> None:
        super().__init__(fails, seconds)
        self.most = 0
        self._breaks = breaks
        self._free_at = 0.0
        self._under_way: list[float] = []

    def compute(self) -> None:
        """Takes no time of the thread that launches."""

    def launched(self, plan: StepPlan) -> Launched:
        now = time.monotonic()
        began = max(now, self._free_at)
        self._free_at = began + self.seconds
        self._under_way = [end for end in self._under_way if end > now] + [self._free_at]
        self.most = max(self.most, len(self._under_way))
        result = StepResult(self.seconds)
        return FakeEvent(FakeLaunched(plan, result), self._free_at, self._breaks(plan))


class FakeEvent:
    """A plan of FakeDevice, done at `end`."""

    def __init__(self, launched: FakeLaunched, end: float, error: Exception | None) -> None:
        self._launched = launched
        self._end = end
        self._error = error

    @property
    def done(self) -> bool:
        return time.monotonic() >= self._end

    def wait(self) -> StepResult:
        time.sleep(max(0.0, self._end - time.monotonic()))
        if self._error is not None:
            raise self._error
        return self._launched.wait()
