"""Graphs on a CPU: what was captured is computed again, into the memory that it had the first time.

So a step that reads anything but its buffers, or whose result is kept without a copy, gives wrong
images here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from weakref import WeakKeyDictionary

from sdbento.models.pipeline import Pipeline
from sdbento.runner.graphs import Graphs, NoRoom
from sdbento.runner.step import StepTensors

NBYTES = 10**9  # of every graph; its buffers are small beside that


class FakeCapture:
    """Counts replays; `fails` is raised in place of a capture."""

    replays = 0
    fails: Exception | None = None

    def __call__(
        self, work: Callable[[], StepTensors], room: int
    ) -> tuple[StepTensors, Callable[[], None], int]:
        if self.fails is not None:
            raise self.fails
        if room < NBYTES:
            raise NoRoom
        made = work()

        def replay() -> None:
            FakeCapture.replays += 1
            again = work()
            for old, new in (
                (made.slots, again.slots),
                (made.output, again.output),
                (made.model_input, again.model_input),
            ):
                old.copy_(new)

        return made, replay, NBYTES


class FakeMemory:
    """Room for some graphs; what each model was counted."""

    def __init__(self, graphs: float = math.inf) -> None:
        self._graphs = graphs
        self.grown: WeakKeyDictionary[Pipeline, int] = WeakKeyDictionary()

    def room(self) -> int:
        taken = sum(self.grown.values())
        return 10**15 if math.isinf(self._graphs) else int(self._graphs * NBYTES) - taken

    def num_graphs(self, pipeline: Pipeline) -> int:
        """That are counted for a model."""
        return self.grown.get(pipeline, 0) // NBYTES

    def grow(self, pipeline: Pipeline, nbytes: int) -> None:
        self.grown[pipeline] = self.grown.get(pipeline, 0) + nbytes


def fake_graphs(
    memory: FakeMemory | None = None,
    capture: Callable[[], FakeCapture] = FakeCapture,
    eager_calls: int = 0,
) -> Graphs:
    return Graphs(32, memory or FakeMemory(), capture, eager_calls)
