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
    submitted: float = 0.0,
    deadline: float = inf,
) -> Trajectory:
    nothing: Any = None  # tables and pipelines are for the real runner
    inputs = PassInputs((), (), 7.5, 0.0, nothing, SQUARE, SQUARE, FromNoise())
    guided = range(num_steps if rows == 2 else 0) if guided_steps is None else guided_steps
    one = Pass(BatchKey(model, side, side), num_steps, guided, inputs, nothing)
    return Trajectory((one,), seed, submitted=submitted, deadline=deadline)


def chained(first: Trajectory, second: Trajectory, *, decodes: bool) -> Trajectory:
    """`first`, followed by the pass of `second`; `decodes`: by way of an image, else of latents."""
    first.passes = (replace(first.current, decodes=decodes), second.current)
    return first


def expected_pixel(seed: int, num_steps: int) -> tuple[int, int, int]:
    """The pixel that FakeRunner makes: it depends only on seed and steps of the last pass."""
    return seed % 256, num_steps % 256, (seed * 7 + num_steps) % 256


class FakeRunner:
    """State is a count of steps; the image is one pixel. Records every plan it executed.

    A plan raises, with no effect, if `fails` is true for any of its trajectories.
    """

    def __init__(
        self,
        fails: Callable[[Trajectory], SDBentoError | Exception | None] = lambda _: None,
        seconds: float = 0.0,
    ) -> None:
        self.plans: list[StepPlan] = []
        self.seconds = seconds
        self._fails = fails

    def execute(self, plan: StepPlan) -> StepResult:
        for trajectory in plan.trajectories:
            if (error := self._fails(trajectory)) is not None:
                raise error
        self.plans.append(plan)
        if self.seconds:
            time.sleep(self.seconds)
        for trajectory in plan.trajectories:
            self._advance(plan.stage, trajectory)
        return StepResult(self.seconds or 0.001)

    def measure(self, *_: object) -> float:
        return self.seconds or 0.001

    def measure_decode(self, *_: object) -> float:
        return self.seconds or 0.001

    def _advance(self, stage: Stage, trajectory: Trajectory) -> None:
        state: Any = trajectory.state
        if stage is Stage.PREPARE:
            trajectory.state, trajectory.previous = cast(Any, 0), None
        elif stage is Stage.STEP:
            trajectory.state = state + 1
        else:
            assert state == trajectory.current.num_steps
            trajectory.image = Image.new("RGB", (1, 1), expected_pixel(trajectory.seed, state))
