"""A runner whose pictures can be computed by hand, for planner, engine and HTTP tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from PIL import Image

from sdbento.engine.trajectory import (
    BatchKey,
    ImageInputs,
    SizeConditioning,
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
    seed: int = 0,
    model: str = "a",
    side: int = 8,
    submitted: float = 0.0,
    deadline: float | None = None,
) -> Trajectory:
    no_table: Any = None  # only the real runner reads it
    inputs = ImageInputs((), (), seed, 7.5, 0.0, no_table, SQUARE, SQUARE)
    guided_steps = range(num_steps if rows == 2 else 0)
    return Trajectory(
        BatchKey(model, side, side),
        num_steps,
        guided_steps,
        inputs,
        submitted=submitted,
        deadline=deadline,
    )


def chained(first: Trajectory, second: Trajectory, *, decodes: bool) -> Trajectory:
    """`first` with `second` to follow it; `decodes`: through a picture, else through latents."""
    first.successor, second.predecessor, first.decodes = second, first, decodes
    return first


def expected_pixel(seed: int, num_steps: int) -> tuple[int, int, int]:
    """What FakeRunner paints: it depends on the trajectory alone."""
    return seed % 256, num_steps % 256, (seed * 7 + num_steps) % 256


class FakeRunner:
    """State is a count of steps; the picture is one pixel. Records every plan it executed.

    `fails` makes a plan raise, atomically, when it holds of any trajectory of it.
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

    def _advance(self, stage: Stage, trajectory: Trajectory) -> None:
        if stage is Stage.PREPARE:
            trajectory.state = 0
        elif stage is Stage.STEP:
            trajectory.state += 1
        else:
            assert trajectory.state == trajectory.num_steps
            pixel = expected_pixel(trajectory.inputs.seed, trajectory.state)
            trajectory.image = Image.new("RGB", (1, 1), pixel)
