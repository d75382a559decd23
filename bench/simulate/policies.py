"""Ways to serve one device: one image at a time, static batches, steps in order of arrival, ours.

A policy is asked for its next piece of work whenever its device is free, and told when that is
done. Only `Ours` decides by what it has learned; it drives the planner that the server runs.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Protocol

from bench.simulate.clock import Clock
from bench.simulate.curves import Curves
from bench.simulate.traces import Request
from sdbento.engine.cost import ENOUGH
from sdbento.engine.planner import Planner
from sdbento.engine.trajectory import BatchKey, Pass, Stage, StepPlan, StepResult, Trajectory

MAX_IMAGES = 16  # in a UNet call: the benchmark's MAX_BATCH_SIZE
STATIC_BATCH = 8
WINDOW = 0.1  # seconds that a static batch waits for company
PIXELS_PER_LATENT = 8
SOMETHING: Any = object()  # in place of what only a real runner needs: tensors, tables, images


@dataclass
class Packing:
    """Seconds of UNet calls, and what their rows would have cost in calls of the best size."""

    seconds: float = 0.0
    best: float = 0.0


class Policy(Protocol):
    """Serves one device. `packing` is of all its UNet calls so far."""

    packing: Packing

    def add(self, request: Request) -> None: ...

    def begin(self) -> float | None:
        """Begin the next work; its seconds, or None when there is none."""

    def end(self) -> list[Request]:
        """The work that was begun is done; who has an image now."""


class Costs:
    """Seconds of work by the curves; notes how well its UNet calls were packed."""

    def __init__(self, curves: Curves) -> None:
        self.curves = curves
        self.packing = Packing()
        self._best: dict[int, float] = {}

    def prepare(self, images: int) -> float:
        return self.curves.prepare * images

    def step(self, side: int, rows: int) -> float:
        seconds = self.curves.step(side, rows)
        if side not in self._best:
            self._best[side] = self.curves.best_row(side, 2 * MAX_IMAGES)
        self.packing.seconds += seconds
        self.packing.best += self._best[side] * rows
        return seconds

    def image(self, request: Request) -> float:
        """Seconds of one whole image alone."""
        return self.images([request])

    def images(self, group: list[Request]) -> float:
        """Seconds of whole images with equal parameters, in calls that they share."""
        first, size = group[0], len(group)
        steps = sum(self.step(first.side, first.rows * size) for _ in range(first.steps))
        return self.prepare(size) + steps + self.curves.decode(first.side, size)


class OneAtATime:
    """The stock pipeline: the oldest image, to its end."""

    name = "one at a time"

    def __init__(self, curves: Curves, _: Clock) -> None:
        self._costs = Costs(curves)
        self.packing = self._costs.packing
        self._waiting: list[Request] = []

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def begin(self) -> float | None:
        return self._costs.image(self._waiting[0]) if self._waiting else None

    def end(self) -> list[Request]:
        return [self._waiting.pop(0)]


class StaticBatches:
    """BentoML's `batchable`: up to STATIC_BATCH requests, not later than WINDOW after the first.

    Within the batch only requests with equal parameters share calls, and the answers to all of it
    leave together.
    """

    name = "static batches"

    def __init__(self, curves: Curves, clock: Clock) -> None:
        self._costs = Costs(curves)
        self.packing = self._costs.packing
        self._clock = clock
        self._waiting: list[tuple[float, Request]] = []
        self._batch: list[Request] = []

    def add(self, request: Request) -> None:
        self._waiting.append((self._clock(), request))

    def begin(self) -> float | None:
        if not self._waiting:
            return None
        left = self._waiting[0][0] + WINDOW - self._clock()
        if len(self._waiting) < STATIC_BATCH and left > 0:
            return min(left, WINDOW / 10)  # until it looks again
        self._batch = [request for _, request in self._waiting[:STATIC_BATCH]]
        del self._waiting[:STATIC_BATCH]
        groups: dict[tuple[Any, ...], list[Request]] = defaultdict(list)
        for r in self._batch:
            groups[r.model, r.side, r.steps, r.rows, r.sampler].append(r)
        return sum(self._costs.images(group) for group in groups.values())

    def end(self) -> list[Request]:
        done, self._batch = self._batch, []
        return done


class Steps:
    """Work in plans of one step each, by whatever makes the plans."""

    def __init__(self, curves: Curves, clock: Clock, planner: Planner) -> None:
        self._costs = Costs(curves)
        self.packing = self._costs.packing
        self._clock = clock
        self._planner = planner
        self._requests: dict[Trajectory, Request] = {}
        self._plan: StepPlan | None = None
        self._seconds = 0.0

    def add(self, request: Request) -> None:
        owner, now = self._owner_of(request), self._clock()
        trajectory = Trajectory((pass_of(request),), seed=0, owner=owner, submitted=now)
        self._requests[trajectory] = request
        self._planner.add([trajectory])

    def begin(self) -> float | None:
        self._plan = self._planner.plan()
        if self._plan is None:
            return None
        self._seconds = self._cost(self._plan)
        if self._plan.stage is Stage.PREPARE:
            for trajectory in self._plan.trajectories:
                trajectory.state = SOMETHING
        self._planner.advance(self._plan)
        return self._seconds

    def end(self) -> list[Request]:
        assert self._plan is not None
        if self._plan.stage is Stage.DECODE:
            for trajectory in self._plan.trajectories:
                trajectory.image = SOMETHING
        ended = self._planner.record(self._plan, StepResult(self._seconds), self._clock())
        return [self._requests.pop(trajectory) for trajectory in ended]

    def _owner_of(self, request: Request) -> str | None:
        return request.owner

    def _cost(self, plan: StepPlan) -> float:
        side = PIXELS_PER_LATENT * plan.key.latent_width
        if plan.stage is Stage.PREPARE:
            return self._costs.prepare(plan.size)
        if plan.stage is Stage.STEP:
            return self._costs.step(side, plan.size)
        return self._costs.curves.decode(side, plan.size)


class InOrder(Planner):
    """Steps are shared, in order of arrival: the oldest image and all that can join it."""

    def plan(self, within: StepPlan | None = None) -> StepPlan | None:
        for stage in (Stage.DECODE, Stage.PREPARE, Stage.STEP):
            ready = [t for t in self._active if t.stage is stage]
            if ready:
                together = [t for t in ready if t.key == ready[0].key]
                return StepPlan(stage, ready[0].key, tuple(together[: self.max_images]))
        return None


class StepsInOrder(Steps):
    name = "steps in order"

    def __init__(self, curves: Curves, clock: Clock) -> None:
        super().__init__(curves, clock, InOrder(MAX_IMAGES, clock=clock))


class Ours(Steps):
    """The server's planner, after the calibration that a server makes when it is idle."""

    name = "sdbento"

    def __init__(self, curves: Curves, clock: Clock) -> None:
        planner = Planner(MAX_IMAGES, clock=clock)
        super().__init__(curves, clock, planner)
        key = pass_of(Request(1, curves.side)).key
        for _ in range(1 + ENOUGH):  # the first timing is discarded
            for rows in (1, 2, 4, 8, 16, 32):
                planner.cost.observe(key, Stage.STEP, rows, curves.step(curves.side, rows))
            planner.cost.observe(key, Stage.DECODE, 1, curves.decode(curves.side, 1))


class OneQueue(Ours):
    """The server's planner where nobody has a key: all requests have the same owner."""

    name = "one queue"

    def _owner_of(self, request: Request) -> None:
        return None


def pass_of(request: Request) -> Pass:
    latent = request.side // PIXELS_PER_LATENT
    guided = range(request.steps if request.rows == 2 else 0)
    return Pass(
        BatchKey(request.model, latent, latent), request.steps, guided, SOMETHING, SOMETHING
    )


POLICIES = (OneAtATime, StaticBatches, StepsInOrder, Ours)
