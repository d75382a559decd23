"""What is recorded of an engine with a fake runner."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from sdbento.engine.loop import Engine
from sdbento.engine.planner import Planner
from sdbento.engine.trajectory import Launched, Stage, StepPlan, Trajectory
from sdbento.live import recorder
from sdbento.live.batch import Left
from sdbento.live.recorder import Recorder
from sdbento.live.snapshot import MAX_WAITING, About, Snapshot
from tests.support.fakes import FakeRunner, chained, make_trajectory

FAR = 60.0


class SteppedByHand(FakeRunner):
    """Launches a step only when `step` says so; whatever else at once."""

    def __init__(self) -> None:
        super().__init__()
        self.may_launch = 0

    def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        if plan.stage is Stage.STEP:
            until(lambda: self.may_launch > 0)
            self.may_launch -= 1
        return super().launch(plan, pause)


def until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


class Watched:
    """An engine that is observed, step by step."""

    def __init__(self, engine: Engine, runner: SteppedByHand) -> None:
        self.engine = engine
        self.snapshots: list[Snapshot] = []
        self.recorder = Recorder(engine, self.snapshots.append)
        engine.observer = self.recorder
        self._runner = runner

    def submit(self, *trajectories: Trajectory, about: object = None) -> Any:
        return self.engine.submit(list(trajectories), time.monotonic() + FAR, about)

    def step(self, number: int = 1) -> Snapshot:
        """Let so many UNet calls be made; the snapshot after the last."""
        for _ in range(number):
            before = self.num_calls
            self._runner.may_launch += 1
            until(partial(self._has_called_since, before))
        return self.snapshots[-1]

    def _has_called_since(self, before: int) -> bool:
        return self.num_calls > before

    @property
    def num_calls(self) -> int:
        return self.snapshots[-1].batch.calls if self.snapshots else 0

    def forget_plans(self) -> None:
        self._runner.plans.clear()

    def end(self) -> None:
        """Let everything run to its end."""
        self._runner.may_launch = 10_000


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, max_images: int = 4) -> Iterator[Watched]:
    monkeypatch.setattr(recorder, "INTERVAL", 0.0)
    runner = SteppedByHand()
    engine = Engine(runner, Planner(max_images))
    engine.start()
    try:
        yield Watched(engine, runner)
    finally:
        runner.may_launch = 10_000
        engine.close(grace=5.0)


def seats(snapshot: Snapshot) -> dict[tuple[int, int], tuple[int, int, int, bool]]:
    """(step, num_steps, rows, joined) of each image that has begun, by request and image."""
    return {
        (one.request, one.image): (one.step, one.num_steps, one.rows, one.joined)
        for lane in snapshot.batch.lanes
        for one in lane.images
    }


def test_who_is_in_the_batch_who_joins_and_who_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as engine:
        engine.submit(make_trajectory(9), make_trajectory(9, seed=1))
        assert seats(engine.step()) == {(1, 0): (1, 9, 2, True), (1, 1): (1, 9, 2, True)}
        short = engine.submit(make_trajectory(2, rows=1))
        engine.step()  # was being launched when the newcomer came
        joined = engine.step()
        assert seats(joined) == {
            (1, 0): (3, 9, 2, False),
            (1, 1): (3, 9, 2, False),
            (2, 0): (1, 2, 1, True),
        }
        assert joined.batch.left == ()
        (lane,) = joined.batch.lanes
        assert (lane.model, lane.width, lane.height) == ("a", 64, 64)
        assert (lane.rows, lane.current) == (5, True)
        engine.step()
        short.done.result(5)
        after = engine.step()
    left = [one for snapshot in engine.snapshots for one in snapshot.batch.left]
    assert left[0] == Left(2, 0, "done")
    assert seats(after) == {(1, 0): (5, 9, 2, False), (1, 1): (5, 9, 2, False)}


def test_who_is_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch, max_images=1) as engine:
        engine.submit(make_trajectory(50, owner="one"))
        engine.step()
        engine.submit(make_trajectory(50, owner="two"))
        until(lambda: Left(1, 0, "paused") in engine.step().batch.left)
        paused = engine.snapshots[-1]
        assert seats(paused)[1, 0][2:] == (0, False)
        assert seats(paused)[2, 0][2:] == (2, True)
        until(lambda: seats(engine.step())[1, 0][3])  # it joins again
        engine.end()


def test_who_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as engine:
        first = engine.submit(make_trajectory(50))
        engine.submit(make_trajectory(50))
        engine.step(3)
        first.cancel()
        after = engine.step(2)
        assert list(seats(after)) == [(2, 0)]
        left = [one for snapshot in engine.snapshots for one in snapshot.batch.left]
        assert left == [Left(1, 0, "ended")]
        engine.end()


def test_lanes_are_by_model_and_size_and_a_second_pass_changes_the_lane(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with watched(monkeypatch) as engine:
        engine.submit(chained(make_trajectory(2), make_trajectory(3, side=16), decodes=True))
        engine.submit(make_trajectory(90, model="b"))
        sides = set()
        for _ in range(12):
            for lane in engine.step().batch.lanes:
                for one in lane.images:
                    if one.request == 1:
                        sides.add((lane.model, lane.width, one.num_steps))
        assert sides == {("a", 64, 5), ("a", 128, 5)}
        assert [lane.model for lane in engine.snapshots[-1].batch.lanes] == ["b"]
        engine.end()


def test_requests_the_queue_and_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    about = About("a cat", "Euler a", ("ink",), 1)
    with watched(monkeypatch, max_images=2) as engine:
        engine.submit(make_trajectory(20), make_trajectory(20), about=about)
        engine.step()
        engine.submit(*(make_trajectory(20, owner="bob") for _ in range(3)))
        engine.step(2)
        snapshot = engine.snapshots[-1]
        one, two = snapshot.batch.requests
        assert (one.prompt, one.sampler, one.loras) == ("a cat", "Euler a", ("ink",))
        assert (one.num_loras, one.num_controlnets, one.num_images) == (1, 1, 2)
        assert not one.yours
        assert (two.prompt, two.num_images) == ("", 3)
        assert snapshot.owners == {1: None, 2: "bob"}
        queue = snapshot.batch.queue
        assert (queue.requests, queue.images) == (2, 5)
        assert queue.waiting == one.num_waiting + two.num_waiting > 0
        recent = snapshot.batch.recent
        assert recent is not None and (recent.calls, recent.rows, recent.images) == (3, 4.0, 2.0)
        engine.step(5)
        until(lambda: engine.step().batch.queue.eta)  # once such steps were timed
        assert engine.snapshots[-1].batch.requests[0].eta is not None
        engine.end()


def test_of_a_long_queue_only_the_first_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as engine:
        engine.submit(make_trajectory(9))
        engine.step()
        for _ in range(MAX_WAITING + 20):
            engine.submit(make_trajectory(9))  # so that none has ended when they are counted
        engine.step()
        batch = engine.step().batch
        assert batch.queue.requests == MAX_WAITING + 21
        num_begun = sum(one.num_waiting == 0 for one in batch.requests)
        assert len(batch.requests) == MAX_WAITING + num_begun < batch.queue.requests
        engine.end()


def test_quick_calls_are_not_recorded_one_by_one() -> None:
    runner = FakeRunner(seconds=0.001)
    engine = Engine(runner, Planner(4))
    snapshots: list[Snapshot] = []
    engine.observer = Recorder(engine, snapshots.append)
    engine.start()
    try:
        began = time.monotonic()
        engine.submit([make_trajectory(150)], began + FAR).done.result(20)
        took = time.monotonic() - began
    finally:
        engine.close()
    assert len(snapshots) <= 2 + took / recorder.INTERVAL


def test_nothing_of_a_request_is_held_after_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as engine:
        handle = engine.submit(make_trajectory(2))
        image = weakref.ref(handle.trajectories[0])
        engine.end()
        handle.done.result(5)
        del handle
        engine.engine.call(lambda: engine.recorder._record(time.monotonic())).result(5)
        engine.forget_plans()
        until(lambda: gc.collect() >= 0 and image() is None)
