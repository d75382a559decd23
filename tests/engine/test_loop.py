from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from math import inf
from queue import SimpleQueue
from weakref import WeakKeyDictionary

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdbento.engine import loop, watchdog
from sdbento.engine.cost import FRESH, RECENT, CostModel
from sdbento.engine.handle import EngineEvent, Estimated, Handle, Stepped
from sdbento.engine.loop import Engine
from sdbento.engine.planner import Planner
from sdbento.engine.trajectory import Launched, Stage, StepPlan, StepResult, Trajectory
from sdbento.errors import (
    Cancelled,
    DeadlineExceeded,
    GenerationFailed,
    OutOfMemory,
    SDBentoError,
    Unavailable,
)
from tests.support.fakes import (
    FakeDevice,
    FakeLaunched,
    FakeRunner,
    chained,
    expected_pixel,
    make_trajectory,
)
from tests.support.metrics import counted

FAR = 60.0
_expected: WeakKeyDictionary[Trajectory, tuple[int, int, int]] = WeakKeyDictionary()


@contextmanager
def running(runner: FakeRunner, max_images: int = 4) -> Iterator[Engine]:
    engine = Engine(runner, Planner(max_images))
    engine.start()
    try:
        yield engine
    finally:
        engine.close(grace=1.0)
        assert not engine.alive


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def submit(engine: Engine, *trajectories: Trajectory, timeout: float = FAR) -> Handle:
    for trajectory in trajectories:
        _expected[trajectory] = expected_pixel(trajectory.seed, trajectory.passes[-1].num_steps)
    return engine.submit(list(trajectories), time.monotonic() + timeout)


def pixel(trajectory: Trajectory) -> tuple[int, int, int]:
    assert trajectory.image is not None
    return trajectory.image.getpixel((0, 0))  # type: ignore[return-value]


def assert_right(handle: Handle) -> None:
    handle.done.result(timeout=5)
    for trajectory in handle.trajectories:
        assert pixel(trajectory) == _expected[trajectory]


def fails_on_seed(seed: int, error: Exception) -> FakeRunner:
    return FakeRunner(lambda t: error if t.seed == seed and t.stage is Stage.STEP else None)


def test_a_request_gets_all_its_images() -> None:
    with running(FakeRunner()) as engine:
        assert_right(submit(engine, *(make_trajectory(seed=seed) for seed in range(6))))


def test_requests_share_calls_and_newcomers_join_at_the_next_step() -> None:
    runner = FakeRunner(seconds=0.002)
    with running(runner) as engine:
        first = submit(engine, make_trajectory(50, seed=1))
        while not any(plan.stage is Stage.STEP for plan in runner.plans):
            time.sleep(0.001)
        second = submit(engine, make_trajectory(5, seed=2))
        assert_right(second)
        assert_right(first)
    shared = [plan for plan in runner.plans if len(plan.trajectories) == 2]
    assert len(shared) >= 5


def test_another_owners_single_image_does_not_wait_for_many_that_came_before() -> None:
    runner = FakeDevice()
    with running(runner) as engine:
        many = [submit(engine, make_trajectory(50, seed=i, owner="many")) for i in range(40)]
        until(lambda: any(plan.stage is Stage.STEP for plan in runner.plans))
        one = submit(engine, make_trajectory(4, owner="one"))
        assert_right(one)
        assert not any(handle.done.done() for handle in many)
        for handle in many:
            handle.cancel()


@pytest.mark.parametrize("decodes", [True, False])
def test_a_second_pass_goes_on_where_the_first_ends(decodes: bool) -> None:
    runner = FakeRunner()
    with running(runner) as engine:
        chains = [
            chained(
                make_trajectory(3, seed=seed),
                make_trajectory(2, seed=seed, side=16),
                decodes=decodes,
            )
            for seed in range(3)
        ]
        handle = submit(engine, *chains, make_trajectory(9, seed=8))
        assert_right(handle)
    assert [t.step for t in handle.trajectories] == [2, 2, 2, 9]
    assert all(t.state is None and t.passes == () for t in handle.trajectories)
    decoded = [t for plan in runner.plans if plan.stage is Stage.DECODE for t in plan.trajectories]
    assert len(decoded) == (7 if decodes else 4)


async def test_events_count_the_steps_of_all_passes() -> None:
    with running(FakeRunner(seconds=0.002)) as engine:
        chain = chained(make_trajectory(3), make_trajectory(2, side=16), decodes=True)
        handle = submit(engine, chain)
        steps = [event async for event in handle.events() if isinstance(event, Stepped)]
    assert [event.step for event in steps][-3:] == [3, 4, 5]
    assert {event.num_steps for event in steps} == {5}


def test_a_failing_second_pass_fails_its_request_only() -> None:
    def fails(t: Trajectory) -> Exception | None:
        return GenerationFailed("second") if t.pass_index == 1 else None

    with running(FakeRunner(fails)) as engine:
        bad = submit(
            engine,
            chained(make_trajectory(2, seed=1), make_trajectory(2, side=16), decodes=True),
        )
        good = submit(engine, make_trajectory(6, seed=2))
        with pytest.raises(GenerationFailed, match="second"):
            bad.done.result(timeout=5)
        assert_right(good)


def test_one_failing_image_fails_only_its_own_request() -> None:
    with running(fails_on_seed(3, ValueError("boom"))) as engine:
        handles = [submit(engine, make_trajectory(seed=seed)) for seed in range(6)]
        bad = handles.pop(3)
        with pytest.raises(SDBentoError, match="unexpected error, id"):
            bad.done.result(timeout=5)
        for handle in handles:
            assert_right(handle)


def test_an_error_of_the_tree_reaches_the_client_unchanged() -> None:
    with running(fails_on_seed(0, GenerationFailed("black picture"))) as engine:
        with pytest.raises(GenerationFailed, match="black picture"):
            submit(engine, make_trajectory(seed=0)).done.result(timeout=5)


class Small(FakeRunner):
    """Has no memory for a step of more than two rows."""

    def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        if plan.stage is Stage.STEP and plan.rows > 2:
            raise OutOfMemory("too many rows")
        return super().launch(plan, pause)


class SmallDevice(Small, FakeDevice):
    """Then, what is under way is waited for."""


@pytest.mark.parametrize("kind", [Small, SmallDevice])
def test_out_of_memory_shrinks_the_batch_and_every_request_finishes(
    kind: type[FakeRunner],
) -> None:
    with running(kind()) as engine:
        for handle in [submit(engine, make_trajectory(seed=seed)) for seed in range(5)]:
            assert_right(handle)


@pytest.mark.parametrize("stage", [Stage.PREPARE, Stage.DECODE])
def test_out_of_memory_in_one_stage_leaves_the_others_alone(stage: Stage) -> None:
    class Small(FakeRunner):
        def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
            if plan.stage is stage and len(plan.trajectories) > 1:
                raise OutOfMemory("too much")
            return super().launch(plan, pause)

    runner = Small(seconds=0.001)
    with running(runner) as engine:
        for handle in [submit(engine, make_trajectory(30, seed=seed)) for seed in range(8)]:
            assert_right(handle)
        together = submit(engine, *(make_trajectory(30, seed=seed) for seed in range(4)))
        assert_right(together)
    last = [plan for plan in runner.plans if plan.trajectories[0] in together.trajectories]
    assert max(len(plan.trajectories) for plan in last if plan.stage is Stage.STEP) == 4
    assert max(len(plan.trajectories) for plan in last if plan.stage is stage) == 1


def test_a_failed_call_frees_its_memory_before_it_is_retried_in_halves() -> None:
    class Allocation:
        pass

    class Small(FakeRunner):
        allocated: weakref.ref[Allocation] | None = None

        def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
            assert self.allocated is None or self.allocated() is None
            if plan.stage is Stage.STEP and len(plan.trajectories) > 1:
                tensor = Allocation()
                self.allocated = weakref.ref(tensor)
                raise MemoryError
            return super().launch(plan, pause)

    with running(Small()) as engine:
        assert_right(submit(engine, *(make_trajectory(seed=seed) for seed in range(4))))


def test_idle_work_runs_when_no_request_can_advance_and_delays_one_by_a_single_piece() -> None:
    runner = FakeRunner()
    pieces, begun, go_on = list[int](), threading.Event(), threading.Event()

    def work() -> Iterator[None]:
        for piece in range(5):
            if piece == 2:
                begun.set()
                assert go_on.wait(5)
            pieces.append(len(runner.plans))
            yield

    with running(runner) as engine:
        engine.when_idle(work())
        assert begun.wait(5)
        handle = submit(engine, make_trajectory(4))
        go_on.set()
        assert_right(handle)
        until(lambda: len(pieces) == 5)
    assert pieces == [0, 0, 0, 6, 6]


def test_idle_work_that_fails_is_dropped_and_harms_no_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def work() -> Iterator[None]:
        yield
        raise MemoryError

    done = threading.Event()
    with running(FakeRunner()) as engine:
        engine.when_idle(work())
        engine.when_idle(iter(done.set, None))  # never ends
        assert_right(submit(engine, make_trajectory()))
        assert done.wait(5)
        assert_right(submit(engine, make_trajectory()))
    assert "given up: the machine ran out of memory" in caplog.text


def test_a_cancelled_request_stops_between_two_steps_and_frees_its_place() -> None:
    runner = FakeRunner(seconds=0.005)
    with running(runner) as engine:
        handle = submit(engine, make_trajectory(10_000))
        time.sleep(0.03)
        handle.cancel()
        with pytest.raises(Cancelled):
            handle.done.result(timeout=1)
        time.sleep(0.02)
        before = len(runner.plans)
        time.sleep(0.02)
        assert len(runner.plans) == before
        assert_right(submit(engine, make_trajectory(seed=9)))


def test_a_request_that_cannot_be_done_in_time_is_refused_at_once() -> None:
    with running(FakeRunner(seconds=0.05)) as engine:
        assert_right(submit(engine, make_trajectory(4)))  # the engine learns what a step takes
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="cannot be done"):
            submit(engine, make_trajectory(1000), timeout=1.0).done.result(timeout=5)
        assert time.monotonic() - started < 1.0


class Paused(FakeRunner):
    """The process pauses for some seconds while it runs plan number `when`."""

    def __init__(self, when: int, seconds: float) -> None:
        super().__init__()
        self._when, self._pause = when, seconds

    def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        launched = super().launch(plan, pause)
        paused = FakeLaunched(plan, StepResult(self._pause))
        return paused if len(self.plans) == self._when else launched


@pytest.mark.parametrize("when", range(1, 8), ids=lambda when: f"plan {when}")
@pytest.mark.parametrize("seconds", [15.0, 1000.0, 0.0], ids=lambda seconds: f"{seconds:g} s")
def test_one_wrong_timing_refuses_no_request(when: int, seconds: float) -> None:
    """Plan 1 prepares, 2 to 6 are steps, 7 decodes."""
    with running(Paused(when, seconds)) as engine:
        assert_right(submit(engine, make_trajectory(5)))
        assert_right(submit(engine, make_trajectory(60), timeout=14.0))


def test_a_rightly_refused_request_is_accepted_once_the_reason_is_old() -> None:
    """Every timing of that size is from a slow period, and refused requests add no better one."""
    now = 0.0
    planner = Planner(4, CostModel(clock=lambda: now))
    slow = make_trajectory()
    for _ in range(RECENT):
        planner.cost.observe(slow.key, Stage.STEP, 2, 15.0)
    engine = Engine(FakeRunner(), planner)
    engine.start()
    for _ in range(1000):
        with pytest.raises(DeadlineExceeded, match="cannot be done"):
            submit(engine, make_trajectory(), timeout=5.0).done.result(timeout=5)
    now = FRESH + 1
    for _ in range(3):
        assert_right(submit(engine, make_trajectory(), timeout=5.0))
    engine.close()


def test_no_request_is_refused_for_a_second_size_that_was_never_measured() -> None:
    with running(FakeRunner(seconds=0.02)) as engine:
        assert_right(submit(engine, make_trajectory(4)))
        hires = make_trajectory(2, side=1024)  # by the small size's timings: minutes
        assert_right(submit(engine, chained(make_trajectory(2), hires, decodes=True), timeout=3.0))


def test_whoever_waits_for_an_end_is_told_when_one_is_expected() -> None:
    with running(FakeRunner(seconds=0.01)) as engine:
        assert engine.endings == []
        lengths = {"a": 2000, "b": 3000, "c": 1000}
        handles = [submit(engine, make_trajectory(n, owner=owner)) for owner, n in lengths.items()]
        until(lambda: [ending.at < inf for ending in engine.endings] == [True] * 3)
        assert [ending.owner for ending in engine.endings] == ["c", "a", "b"]
        assert engine.endings[0].at > time.monotonic()
        for handle in handles:
            handle.cancel()
        until(lambda: not engine.endings)


def test_a_request_that_becomes_late_ends_with_its_timeout() -> None:
    with running(FakeRunner(seconds=0.01)) as engine:
        busy = [submit(engine, make_trajectory(30, seed=s)) for s in range(8)]
        with pytest.raises(DeadlineExceeded):
            submit(engine, make_trajectory(45), timeout=0.2).done.result(timeout=5)
        for handle in busy:
            assert_right(handle)


def test_a_stopping_engine_refuses_newcomers_and_finishes_the_rest() -> None:
    engine = Engine(FakeRunner(seconds=0.005), Planner(4))
    engine.start()
    handle = submit(engine, make_trajectory(20))
    engine.close(grace=5.0)
    assert_right(handle)
    with pytest.raises(Unavailable):
        submit(engine, make_trajectory())


def test_requests_unfinished_after_the_grace_period_end_with_an_error() -> None:
    engine = Engine(FakeRunner(seconds=0.01), Planner(4))
    engine.start()
    handle = submit(engine, make_trajectory(100_000))
    engine.close(grace=0.05)
    with pytest.raises(Unavailable):
        handle.done.result(timeout=1)


def test_a_bug_in_the_loop_fails_the_requests_and_the_engine_goes_on() -> None:
    class Buggy(Planner):
        broken = True

        def plan(self, within: StepPlan | None = None) -> StepPlan | None:
            if Buggy.broken and self._active:
                Buggy.broken = False
                raise KeyError("bug")
            return super().plan(within)

    engine = Engine(FakeRunner(), Buggy(4))
    engine.start()
    with pytest.raises(SDBentoError, match="unexpected error"):
        submit(engine, make_trajectory()).done.result(timeout=5)
    assert_right(submit(engine, make_trajectory()))
    engine.close()


def test_an_engine_that_is_abandoned_in_a_call_tells_everybody_and_takes_no_more() -> None:
    """Its thread hangs meanwhile, and what it does afterwards harms nobody."""
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(_: Trajectory) -> None:
        hangs.set()
        goes_on.wait(FAR)

    engine = Engine(FakeRunner(hang), Planner(4))
    handles = [submit(engine, make_trajectory(seed=seed)) for seed in range(2)]
    engine.start()
    assert hangs.wait(5)
    engine.abandon()
    for handle in handles:
        with pytest.raises(Unavailable, match="is being restarted") as caught:
            handle.done.result(timeout=5)
        assert caught.value.retry_after
    with pytest.raises(Unavailable, match="is being restarted"):
        submit(engine, make_trajectory())
    assert not engine.alive
    engine.close()  # waits for nothing
    goes_on.set()
    engine._thread.join(5)
    assert not engine._thread.is_alive()


def test_an_engine_can_be_closed_though_its_thread_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdbento.engine.loop.LAST_CALL", 0.01)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang() -> Iterator[None]:
        hangs.set()
        goes_on.wait(FAR)
        yield

    engine = Engine(FakeRunner(), Planner(4))
    engine.start()
    engine.when_idle(hang())
    assert hangs.wait(5)
    engine.close(grace=0.0)
    goes_on.set()
    engine._thread.join(5)
    assert not engine.alive


@pytest.mark.parametrize("stage", Stage)
def test_a_call_that_hangs_in_any_stage_is_reported(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdbento.engine.watchdog.TICK", 0.01)
    goes_on, reasons = threading.Event(), SimpleQueue[str]()

    def hang(trajectory: Trajectory) -> None:
        if trajectory.stage is stage:
            goes_on.wait(FAR)

    engine = Engine(FakeRunner(hang), Planner(4), stall=0.001, on_failure=reasons.put)
    engine.start()
    submit(engine, make_trajectory(1))
    assert f"{stage} of a hangs" in reasons.get(timeout=5)
    engine.abandon()
    goes_on.set()
    engine._thread.join(5)


def test_a_device_that_never_gets_done_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdbento.engine.watchdog.TICK", 0.01)
    reasons = SimpleQueue[str]()
    engine = Engine(FakeDevice(seconds=3.0), Planner(4), stall=0.01, on_failure=reasons.put)
    engine.start()
    submit(engine, make_trajectory(1))
    assert "of a hangs" in reasons.get(timeout=5)
    engine.abandon()
    engine._thread.join(10)


def test_a_loop_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdbento.engine.watchdog.TICK", 0.01)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    reasons = SimpleQueue[str]()
    engine = Engine(FakeRunner(), Planner(4), on_failure=reasons.put)
    monkeypatch.setattr(engine, "_iterate", lambda: 1 / 0)
    monkeypatch.setattr(engine, "_fail_everyone", lambda _: 1 / 0)
    handle = submit(engine, make_trajectory())
    engine.start()
    assert "has died" in reasons.get(timeout=5)
    engine.abandon()
    with pytest.raises(Unavailable, match="is being restarted"):
        handle.done.result(timeout=5)


async def test_events_report_the_queue_and_every_step() -> None:
    with running(FakeRunner(seconds=0.002)) as engine:
        handle = submit(engine, make_trajectory(5, seed=1), make_trajectory(5, seed=2))
        events: list[EngineEvent] = [event async for event in handle.events()]
    assert isinstance(events[0], Estimated)
    for image in (0, 1):
        steps = [e.step for e in events if isinstance(e, Stepped) and e.image == image]
        assert steps == sorted(steps)
        assert steps[-1] == 5
    assert_right(handle)


def test_a_listener_may_come_in_the_midst_of_the_first_step() -> None:
    events: list[EngineEvent] = []

    def listen(trajectory: Trajectory) -> None:
        if trajectory.state is not None and not handle.has_listeners:
            handle.listen(events.append)

    engine = Engine(FakeRunner(listen), Planner(4))
    handle = submit(engine, make_trajectory(5))
    engine.start()
    handle.done.result(timeout=5)
    engine.close(grace=1.0)
    assert [event.step for event in events if isinstance(event, Stepped)] == [1, 2, 3, 4, 5]
    assert_right(handle)


async def test_leaving_the_events_cancels_the_request() -> None:
    with running(FakeRunner(seconds=0.005)) as engine:
        handle = submit(engine, make_trajectory(10_000))
        events = handle.events()
        await anext(events)
        await events.aclose()
        with pytest.raises(Cancelled):
            await asyncio.wait_for(asyncio.wrap_future(handle.done), 1)


async def test_cancelling_whoever_awaits_a_request_cancels_it() -> None:
    with running(FakeRunner(seconds=0.005)) as engine:
        handle = submit(engine, make_trajectory(10_000))
        waiter = asyncio.create_task(handle.wait())
        await asyncio.sleep(0.02)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        with pytest.raises(Cancelled):
            await asyncio.wait_for(asyncio.wrap_future(handle.done), 1)


def test_a_step_is_launched_before_the_device_has_done_the_last_one() -> None:
    device = FakeDevice()
    with running(device) as engine:
        assert_right(submit(engine, make_trajectory(30, seed=1), make_trajectory(9, seed=2)))
    assert device.most == 2
    steps = [plan for plan in device.plans if plan.stage is Stage.STEP]
    assert len(steps) == 30


def test_whoever_arrives_while_the_device_is_busy_joins_the_next_step() -> None:
    device = FakeDevice(seconds=0.1)
    with running(device) as engine:
        first = submit(engine, make_trajectory(12, seed=1))
        until(lambda: len(device.plans) == 8)  # by now it is known how long a step takes
        second = submit(engine, make_trajectory(2, seed=2))
        assert_right(second)
        assert_right(first)
    assert device.plans[8].trajectories == tuple(second.trajectories)  # prepared
    assert set(device.plans[9].trajectories) == {*first.trajectories, *second.trajectories}


@pytest.mark.parametrize("stage", Stage)
def test_an_error_of_the_device_fails_the_requests_of_that_plan(stage: Stage) -> None:
    def breaks(plan: StepPlan) -> Exception | None:
        hit = plan.stage is stage and any(t.seed == 3 for t in plan.trajectories)
        return GenerationFailed("broken") if hit else None

    with running(FakeDevice(breaks=breaks), max_images=1) as engine:
        handles = [submit(engine, make_trajectory(seed=seed)) for seed in range(6)]
        with pytest.raises(GenerationFailed, match="broken"):
            handles.pop(3).done.result(timeout=5)
        for handle in handles:
            assert_right(handle)


async def test_events_tell_the_steps_that_the_device_has_done() -> None:
    device = FakeDevice(seconds=0.02)
    with running(device) as engine:
        handle = submit(engine, make_trajectory(6))
        counts = list[tuple[int, int]]()
        async for event in handle.events():
            if isinstance(event, Stepped):
                counts.append((event.step, len(device.plans)))
    assert [step for step, _ in counts] == [1, 2, 3, 4, 5, 6]
    assert all(launched > step for step, launched in counts)  # one plan prepares


def test_a_request_that_is_cancelled_while_its_step_is_under_way_harms_nobody() -> None:
    with running(FakeDevice(seconds=0.02)) as engine:
        for seed in range(5):
            cancelled = submit(engine, make_trajectory(1000))
            other = submit(engine, make_trajectory(4, seed=seed))
            time.sleep(0.05)
            cancelled.cancel()
            with pytest.raises(Cancelled):
                cancelled.done.result(timeout=5)
            assert_right(other)


@pytest.mark.parametrize("kind", [FakeRunner, FakeDevice])
@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 30),
            st.sampled_from([1, 2]),
            st.sampled_from([8, 16]),
            st.sampled_from(["stay", "stay", "cancel", "fail"]),
            st.integers(1, 3),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_no_mix_of_arrivals_cancels_and_failures_harms_other_requests(
    kind: type[FakeRunner],
    visits: list[tuple[int, int, int, str, int]],
) -> None:
    doomed = {seed for seed, visit in enumerate(visits) if visit[3] == "fail"}

    def fails(trajectory: Trajectory) -> Exception | None:
        return ValueError("x") if trajectory.seed // 10 in doomed and trajectory.step > 0 else None

    runner = kind(fails, 0.0001)
    with running(runner, max_images=3) as engine:
        handles = []
        for seed, (steps, rows, side, fate, num_images) in enumerate(visits):
            images = [
                make_trajectory(steps, rows=rows, side=side, seed=10 * seed + i)
                for i in range(num_images)
            ]
            handles.append(submit(engine, *images))
            if fate == "cancel":
                handles[-1].cancel()
        for handle, (_, _, _, fate, _) in zip(handles, visits, strict=True):
            if fate == "stay":
                assert_right(handle)
            elif fate == "fail":
                with pytest.raises(SDBentoError):
                    handle.done.result(timeout=5)
            else:
                assert isinstance(handle.done.exception(timeout=5), Cancelled | None)


class PausingRunner(FakeRunner):
    """Pauses in the midst of every plan that may; `arrives` is called in the first pause."""

    def __init__(self, arrives: Callable[[], None]) -> None:
        super().__init__()
        self._arrives = arrives

    def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        if pause is not None:
            arrives, self._arrives = self._arrives, lambda: None
            arrives()
            for _ in range(3):  # whoever comes in one has its turn in the next
                pause()
                time.sleep(0.001)
        return super().launch(plan)


def paused(arrives: Callable[[Engine, Handle], None]) -> tuple[Handle, PausingRunner]:
    """A long request, in whose first plan something `arrives`."""
    large = make_trajectory(2, side=512, owner="a")
    runner = PausingRunner(lambda: arrives(engine, handle))
    engine = Engine(runner, Planner(4))
    handle = submit(engine, large)
    with suppress(Cancelled):
        engine.start()
        handle.done.result(timeout=10)
    engine.close()
    return handle, runner


def test_a_short_request_of_another_owner_is_done_while_a_long_plan_pauses() -> None:
    short: list[Handle] = []
    handle, runner = paused(
        lambda engine, _: short.append(submit(engine, make_trajectory(1, owner="b")))
    )
    assert_right(handle)
    assert_right(short[0])
    first = next(plan for plan in runner.plans if plan.stage is Stage.STEP)
    assert first.trajectories == tuple(short[0].trajectories)


def test_what_is_called_between_two_steps_is_not_called_in_a_pause() -> None:
    calls: list[tuple[Future[None], list[bool]]] = []

    def arrives(engine: Engine, _: Handle) -> None:
        pausing: list[bool] = []
        done = engine.call(lambda: pausing.append(engine._long is not None))
        calls.append((done, pausing))

    handle, _ = paused(arrives)
    assert_right(handle)
    [(done, pausing)] = calls
    done.result(timeout=5)
    assert pausing == [False]


@pytest.mark.parametrize("which", ["long", "short"])
def test_a_hang_of_a_long_plan_after_a_pause_and_of_one_within_it_is_noticed(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "TICK", 0.01)
    monkeypatch.setattr(loop, "SLOW", 0.0)
    monkeypatch.setattr(loop, "UNTIMED", 1.0)
    failure: SimpleQueue[str] = SimpleQueue()
    goes_on = threading.Event()

    class Hanging(PausingRunner):
        def compute(self) -> None:
            plan = self.plans[-1]
            if plan.stage is Stage.STEP and plan.key.model == which:
                goes_on.wait(FAR)

    def arrives() -> None:
        submit(engine, make_trajectory(1, model="short", owner="b"))

    engine = Engine(Hanging(arrives), Planner(4), stall=0.2, on_failure=failure.put)
    submit(engine, make_trajectory(2, side=512, model="long", owner="a"))
    engine.start()
    try:
        assert f"step of {which} hangs" in failure.get(timeout=10)
    finally:
        engine.abandon()
        goes_on.set()


def test_a_long_plan_ends_in_a_pause_when_its_request_is_cancelled() -> None:
    handle, runner = paused(lambda _, handle: handle.cancel())
    with pytest.raises(Cancelled):
        handle.done.result(timeout=0)
    assert not [plan for plan in runner.plans if plan.stage is Stage.STEP]


class Noting:
    """An observer that keeps what it is told; `fails`: how often it raises first."""

    def __init__(self, fails: int = 0) -> None:
        self.calls: list[tuple[StepPlan, list[int], float]] = []
        self.num_changes = 0
        self._fails = fails

    def called(self, plan: StepPlan, steps_done: list[int], seconds: float) -> None:
        self.calls.append((plan, steps_done, seconds))

    def changed(self) -> None:
        self.num_changes += 1
        if self.num_changes <= self._fails:
            raise RuntimeError("a bug of the observer")


@pytest.mark.parametrize("kind", [FakeRunner, FakeDevice])
def test_an_observer_is_told_of_every_call_and_of_who_comes_and_goes(
    kind: type[FakeRunner],
) -> None:
    with running(kind(seconds=0.002)) as engine:
        engine.observer = observer = Noting()
        images = [make_trajectory(3, seed=1), make_trajectory(3, seed=2)]
        assert_right(submit(engine, *images))
        until(lambda: observer.num_changes == 2)
        engine.observer = None
        assert_right(submit(engine, make_trajectory(4)))
    assert [(set(plan.trajectories), done) for plan, done, _ in observer.calls] == [
        (set(images), [step, step]) for step in (1, 2, 3)
    ]
    assert all(seconds > 0 for *_, seconds in observer.calls)


def test_an_observer_that_fails_harms_no_request_and_is_told_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(FakeRunner()) as engine:
        engine.observer = observer = Noting(fails=1)
        assert_right(submit(engine, make_trajectory(4)))
        until(lambda: engine.observer is None)
    assert (observer.num_changes, observer.calls) == (1, [])
    assert "an observer of the engine failed" in caplog.text


def test_requests_have_numbers_and_what_was_said_of_them() -> None:
    with running(FakeRunner(seconds=0.002)) as engine:
        handles = [
            engine.submit([make_trajectory(99)], time.monotonic() + FAR, about)
            for about in ("one", "two")
        ]
        requests: list[Handle] = []
        engine.call(lambda: requests.extend(engine.requests())).result(5)
        engine.call(lambda: None).result(5)  # another step, and with it a forecast
        assert [ending.request for ending in engine.endings] == [1, 2]
        for handle in handles:
            handle.cancel()
    assert requests == handles
    assert [(one.number, one.about) for one in requests] == [(1, "one"), (2, "two")]


async def test_estimates_take_a_small_part_of_the_time_however_long_each_takes() -> None:
    """Everybody's are made anew in turn."""

    class Slow(Planner):
        num_estimates = 0

        def eta(self, trajectories: Iterable[Trajectory]) -> float:
            self.num_estimates += 1
            time.sleep(0.01)
            return super().eta(trajectories)

    async def events_of(handle: Handle) -> list[EngineEvent]:
        return [event async for event in handle.events()]

    planner = Slow(8)
    engine = Engine(FakeRunner(seconds=0.002), planner)
    handles = [submit(engine, make_trajectory(400, seed=seed)) for seed in range(4)]
    listening = [asyncio.create_task(events_of(handle)) for handle in handles]
    await asyncio.sleep(0)
    began = time.monotonic()
    engine.start()
    events = await asyncio.gather(*listening)
    seconds = time.monotonic() - began
    await asyncio.to_thread(engine.close)
    assert [len([e for e in own if isinstance(e, Stepped)]) for own in events] == [400] * 4
    assert 4 < planner.num_estimates < 5 + seconds / 0.1  # each of 1600 steps has an estimate
    assert len({handle.estimated for handle in handles}) == 4


def test_what_the_engine_computes_is_counted() -> None:
    before = counted()
    with running(FakeRunner()) as engine:
        assert_right(submit(engine, make_trajectory(4, model="of-tests", side=64)))
        assert_right(submit(engine, make_trajectory(3, model="of-tests", side=128, rows=1)))
    grown = counted().since(before)
    assert grown == {
        "sdbento_step_seconds_count{model=of-tests,size=512}": 4,
        "sdbento_step_seconds_count{model=of-tests,size=1024}": 3,
        "sdbento_step_rows_count": 7,
        "sdbento_step_rows_sum": 11,
        "sdbento_rows_total{kind=useful}": 11,
        "sdbento_decode_seconds_count": 2,
    }


def test_images_are_active_from_when_they_are_taken_in_to_their_end() -> None:
    runner = FakeRunner(seconds=0.001)
    with running(runner) as engine:
        submit(engine, *(make_trajectory(10**6, seed=seed) for seed in range(3)))
        handle = submit(engine, make_trajectory(10**6))
        until(lambda: counted().value("sdbento_active_images") == 4)
        handle.cancel()
        until(lambda: counted().value("sdbento_active_images") == 3)
    assert counted().value("sdbento_active_images") == 0


def test_each_call_that_runs_out_of_memory_is_counted_and_only_rows_that_were_computed() -> None:
    """Four images whose steps fit one at a time: calls of 4, 2 and 2 fail once each."""
    full = FakeRunner()
    launch = full.launch

    def too_large(plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        if plan.stage is Stage.STEP and len(plan.trajectories) > 1:
            raise OutOfMemory("too little memory")
        return launch(plan, pause)

    full.launch = too_large  # type: ignore[method-assign]
    before = counted()
    with running(full) as engine:
        assert_right(submit(engine, *(make_trajectory(2, seed=seed) for seed in range(4))))
    grown = counted().since(before)
    assert grown["sdbento_out_of_memory_total"] == 3
    assert grown["sdbento_rows_total{kind=useful}"] == grown["sdbento_step_rows_sum"] == 16
