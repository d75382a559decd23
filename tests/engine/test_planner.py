from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdbento.engine.cost import MAX_CURVES
from sdbento.engine.overdue import GRACE, PRICE
from sdbento.engine.planner import CALL_SECONDS, CROWD, UNTRIED, Planner
from sdbento.engine.trajectory import BatchKey, Stage, StepPlan, StepResult, Trajectory
from sdbento.errors import DeadlineExceeded, GenerationFailed
from tests.support.fakes import FakeRunner, chained, make_trajectory


def planner_with(*trajectories: Trajectory, max_images: int = 4) -> Planner:
    """A planner that has learned that a step costs the same for 1 to 8 rows."""
    planner = Planner(max_images, clock=lambda: 0.0)
    for trajectory in trajectories * 2:  # the first timing of each size is discarded
        for rows in range(1, 2 * max_images + 1):
            planner.cost.observe(trajectory.key, Stage.STEP, rows, 0.1 + rows / 1000)
        planner.cost.observe(trajectory.key, Stage.DECODE, 1, 0.01)
    planner.add(trajectories)
    return planner


def prepared(trajectory: Trajectory) -> Trajectory:
    trajectory.state = cast(Any, 0)  # as FakeRunner
    return trajectory


def next_plan(planner: Planner) -> StepPlan:
    plan = planner.plan()
    assert plan is not None
    return plan


def run(planner: Planner, runner: FakeRunner, plan: StepPlan, now: float) -> list[Trajectory]:
    """Launch a plan and record its result; returns the trajectories that it ends."""
    launched = runner.launch(plan)
    planner.advance(plan)
    return planner.record(plan, launched.wait(), now)


def run_to_the_end(planner: Planner, now: float = 0.0) -> list[Trajectory]:
    """Drive a planner with the fake runner; returns the trajectories in the order they finish."""
    runner, finished = FakeRunner(), list[Trajectory]()
    while (plan := planner.plan()) is not None:
        finished += run(planner, runner, plan, now)
        now += 0.001
    return finished


def test_an_idle_planner_plans_nothing() -> None:
    assert Planner(4).plan() is None


def test_finished_latents_come_before_everything_and_newcomers_are_prepare_new() -> None:
    fresh, running = make_trajectory(), prepared(make_trajectory())
    done = prepared(make_trajectory(num_steps=1))
    done.step = 1
    planner = planner_with(fresh, running, done)
    assert next_plan(planner).stage is Stage.DECODE
    planner.remove([done])
    assert next_plan(planner).trajectories == (fresh,)
    planner.remove([fresh])
    assert next_plan(planner).stage is Stage.STEP


def test_no_trajectory_is_prepared_that_would_have_to_wait() -> None:
    running = prepared(make_trajectory(4))
    long = make_trajectory(50)
    planner = planner_with(long, running, max_images=1)
    assert next_plan(planner) == StepPlan(Stage.STEP, running.key, (running,))


def test_a_step_costs_two_rows_only_while_it_is_guided() -> None:
    trajectory = prepared(make_trajectory(10, guided_steps=range(2, 5)))
    rows = []
    for trajectory.step in range(10):
        rows.append(trajectory.rows)
        calls = trajectory.current.remaining_calls(trajectory.step)
        assert sum(width * count for _, width, count in calls) == 13 - sum(rows[:-1])
    assert rows == [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 40), st.integers(1, 10))
def test_the_calls_to_come_are_those_of_the_steps_to_come(
    num_steps: int, start: int, stop: int, interval: int
) -> None:
    guided = range(start, min(stop, num_steps)) or range(0)
    one = make_trajectory(num_steps, guided_steps=guided, deep_cache_interval=interval).current
    for first in range(num_steps + 1):
        steps = range(first, num_steps)
        expected = Counter((one.key_at(step), one.rows_at(step)) for step in steps)
        counted = Counter[Any]()
        for key, rows, num_calls in one.remaining_calls(first):
            counted[key, rows] += num_calls
        assert counted == expected


def test_a_shallow_step_always_has_a_whole_one_with_its_rows_before_it() -> None:
    one = make_trajectory(9, guided_steps=range(4, 7), deep_cache_interval=3).current
    assert [one.key_at(step).shallow for step in range(10)] == [
        *(False, True, True),
        *(False, False, True),  # guidance begins at step 4
        *(False, True, True),
        False,  # decoding
    ]
    assert not any(make_trajectory(9).current.is_shallow(step) for step in range(9))


def test_shallow_steps_share_calls_with_one_another_and_whole_ones_with_those_of_others() -> None:
    plain = prepared(make_trajectory(9))
    cached = [prepared(make_trajectory(9, deep_cache_interval=3)) for _ in range(3)]
    for step, trajectory in zip((1, 5, 3), cached, strict=True):
        trajectory.step = step
    planner = planner_with(plain, *cached)
    assert set(next_plan(planner).trajectories) in ({plain, cached[2]}, {cached[0], cached[1]})
    planner.remove([plain, cached[2]])
    assert set(next_plan(planner).trajectories) == {cached[0], cached[1]}


def test_an_image_with_cheaper_steps_is_less_work() -> None:
    plain, cached = (prepared(make_trajectory(9, deep_cache_interval=k)) for k in (1, 3))
    planner = planner_with(plain)
    for rows in range(1, 9):
        for _ in range(3):
            planner.cost.observe(cached.current.key_at(1), Stage.STEP, rows, 0.01 + rows / 1000)
    assert planner.work(cached) < 0.6 * planner.work(plain)
    assert planner.seconds_alone(cached) < 0.6 * planner.seconds_alone(plain)


def test_the_work_of_an_image_includes_the_passes_to_follow() -> None:
    alone, first, second = (prepared(make_trajectory(6)) for _ in range(3))
    planner = planner_with(alone, first)
    work, fastest = planner.work(alone), planner.seconds_alone(alone)
    chained(first, second, decodes=True)
    assert planner.work(first) == 2 * work
    assert planner.seconds_alone(first) == 2 * fastest


def test_only_equal_keys_share_a_plan() -> None:
    members = [prepared(make_trajectory(side=side)) for side in (8, 8, 16)]
    plan = next_plan(planner_with(*members))
    assert plan.trajectories == tuple(members[:2])


def test_a_short_request_passes_a_long_one_that_came_first() -> None:
    long, short = make_trajectory(50), make_trajectory(4)
    assert run_to_the_end(planner_with(long, short, max_images=1))[0] is short


def test_a_long_request_does_not_starve_however_many_short_ones_arrive() -> None:
    long = prepared(make_trajectory(150, submitted=0.0))
    planner = planner_with(long, max_images=1)
    runner, now = FakeRunner(), 0.0
    while not long.finished:
        planner.add([make_trajectory(1, submitted=now)])
        for _ in range(3):  # as many plans as the newcomer needs alone
            plan = next_plan(planner)
            run(planner, runner, plan, now)
            now += 1.0
        assert now < 5_000, "the long request starves"


def test_a_batch_holds_at_most_max_images_and_no_more_rows_than_pay() -> None:
    members = [prepared(make_trajectory(rows=2)) for _ in range(10)]
    planner = planner_with(*members, max_images=4)
    assert len(next_plan(planner).trajectories) == 4
    for _ in range(100):  # now 8 rows cost twice what 4 rows cost
        for rows in range(1, 9):
            planner.cost.observe(members[0].key, Stage.STEP, rows, max(0.1, rows / 40))
    assert next_plan(planner).rows == 4


def test_a_guided_image_runs_even_where_only_one_row_pays() -> None:
    guided = prepared(make_trajectory(rows=2))
    planner = planner_with(guided, max_images=1)
    planner.shrink(StepPlan(Stage.STEP, guided.key, (guided,)))
    assert next_plan(planner).trajectories == (guided,)


def test_after_running_out_of_memory_batches_of_that_key_are_halved() -> None:
    members = [prepared(make_trajectory(rows=2)) for _ in range(4)]
    planner = planner_with(*members)
    planner.shrink(next_plan(planner))
    assert next_plan(planner).rows == 4


def finished(num_images: int, side: int = 8) -> list[Trajectory]:
    members = [prepared(make_trajectory(1, side=side)) for _ in range(num_images)]
    for member in members:
        member.step = 1
    return members


@pytest.mark.parametrize("stage", [Stage.PREPARE, Stage.DECODE])
def test_out_of_memory_in_one_stage_does_not_limit_another(stage: Stage) -> None:
    stepping = [prepared(make_trajectory()) for _ in range(4)]
    planner = planner_with(*stepping)
    others = finished(4) if stage is Stage.DECODE else [make_trajectory() for _ in range(4)]
    planner.shrink(StepPlan(stage, stepping[0].key, tuple(others)))
    assert next_plan(planner).rows == 8
    planner.remove(stepping)
    planner.add(others)
    assert (next_plan(planner).stage, len(next_plan(planner).trajectories)) == (stage, 2)


@pytest.mark.parametrize(("side", "num_images"), [(8, 16), (64, 16), (128, 4), (256, 1), (512, 1)])
def test_a_decode_has_a_bound_in_pixels(side: int, num_images: int) -> None:
    planner = planner_with(*finished(20, side), max_images=16)
    assert len(next_plan(planner).trajectories) == num_images


class Device:
    """A device with memory for some rows; counts how many of `num_plans` plans ran out of it."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        members = [prepared(make_trajectory(10**9)) for _ in range(8)]
        self.planner = planner_with(*members, max_images=8)

    def run(self, num_plans: int) -> int:
        failed = 0
        for _ in range(num_plans):
            plan = next_plan(self.planner)
            if split := plan.rows > self.rows:
                self.planner.shrink(plan)
                failed += 1
            self.planner.advance(plan)
            result = StepResult(0.1 + plan.rows / 1000)
            self.planner.record(plan, result, 0.0, learn=not split)
        return failed

    @property
    def batch(self) -> int:
        return next_plan(self.planner).rows


def test_memory_that_becomes_free_is_used_again() -> None:
    device = Device(rows=5)
    assert device.run(5) == 2  # 16, 8
    assert device.batch == 4
    device.rows = 100
    assert device.run(600) == 0
    assert device.batch == 16


def test_a_limit_that_stays_costs_ever_fewer_failed_plans() -> None:
    device = Device(rows=11)
    device.run(1000)
    assert device.batch == 10
    assert device.run(2000) <= 3
    assert device.run(2000) <= 2
    assert device.batch == 10


def test_limits_follow_memory_that_comes_and_goes() -> None:
    device = Device(rows=16)
    for rows in (6, 16, 3, 12, 2):
        device.rows = rows
        assert device.run(1500) <= 8
        assert device.batch == rows // 2 * 2


def test_a_plan_that_ran_in_parts_teaches_nothing_about_the_whole() -> None:
    members = [prepared(make_trajectory()) for _ in range(4)]
    planner = planner_with(*members)
    before = planner.cost.seconds(members[0].key, Stage.STEP, 8)
    for _ in range(9):
        planner.record(next_plan(planner), StepResult(100.0), 0.0, learn=False)
    assert planner.cost.seconds(members[0].key, Stage.STEP, 8) == before


def test_a_failure_ends_its_own_trajectory_only() -> None:
    bad, good = prepared(make_trajectory()), prepared(make_trajectory())
    planner = planner_with(bad, good)
    error = GenerationFailed("no")
    plan = next_plan(planner)
    planner.advance(plan)
    assert planner.record(plan, StepResult(1.0, {bad: error}), 0.0) == [bad]
    assert bad.error is error
    assert (good.error, good.step) == (None, 1)
    assert next_plan(planner).trajectories == (good,)


def test_a_late_trajectory_ends_with_an_error_that_names_its_timeout() -> None:
    late = prepared(make_trajectory(submitted=0.0, deadline=5.0))
    planner = planner_with(late)
    plan = next_plan(planner)
    planner.advance(plan)
    assert planner.record(plan, StepResult(1.0), 5.1) == [late]
    assert isinstance(late.error, DeadlineExceeded)
    assert "5 s" in late.error.message
    assert planner.plan() is None


def test_the_eta_counts_the_work_ahead_and_not_the_work_behind() -> None:
    mine = prepared(make_trajectory(10))
    alone = planner_with(mine).eta([mine])
    behind = planner_with(mine, prepared(make_trajectory(100))).eta([mine])
    ahead = planner_with(mine, prepared(make_trajectory(5))).eta([mine])
    assert alone == behind < ahead


@given(
    st.lists(
        st.tuples(
            st.integers(1, 12),
            st.sampled_from([1, 2]),
            st.sampled_from([8, 16]),
            st.sampled_from([None, "a", "b"]),
        ),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 5),
)
def test_every_mix_runs_to_its_end_in_plans_within_the_bounds(
    mix: list[tuple[int, int, int, str | None]], max_images: int
) -> None:
    members = [
        make_trajectory(steps, rows=rows, side=side, owner=owner)
        for steps, rows, side, owner in mix
    ]
    planner, runner = planner_with(*members, max_images=max_images), FakeRunner()
    while (plan := planner.plan()) is not None:
        assert len({(t.stage, t.key) for t in plan.trajectories}) == 1
        if plan.stage is not Stage.PREPARE:
            assert len(plan.trajectories) <= max_images
        run(planner, runner, plan, 0.0)
    assert all(t.image is not None and t.step == t.current.num_steps for t in members)


def test_keys_differ_by_model_and_size_only() -> None:
    assert BatchKey("m", 8, 8) == BatchKey("m", 8, 8)
    assert len({BatchKey("m", 8, 8), BatchKey("n", 8, 8), BatchKey("m", 8, 16)}) == 3


def priced(side: int, rows: int) -> float:
    return (1.0 + rows) * (side / 8) ** 2 / 100


def learn_prices(planner: Planner, sides: tuple[int, ...]) -> Planner:
    """Let a planner learn `priced`."""
    max_images = planner.max_images
    for side in sides:
        key = BatchKey("a", side, side)
        for _ in range(4):
            for rows in range(1, 2 * max_images + 1):
                planner.cost.observe(key, Stage.STEP, rows, priced(side, rows))
            planner.cost.observe(key, Stage.DECODE, 1, priced(side, 1))
    return planner


class Served:
    """A planner with a device of which every call takes as long as `priced` says."""

    def __init__(
        self, max_images: int, sides: tuple[int, ...] = (), make: type[Planner] = Planner
    ) -> None:
        self.now = 0.0
        self.planner = learn_prices(make(max_images, clock=lambda: self.now), sides)
        self.plans: list[StepPlan] = []
        self.seconds: defaultdict[str | None, float] = defaultdict(float)  # of the device

    def add(self, *members: Trajectory) -> None:
        for member in members:
            member.submitted = self.now
            prepared(member)
        self.planner.add(members)

    def call(self) -> list[Trajectory]:
        """One plan; returns the trajectories that it ends."""
        plan = next_plan(self.planner)
        seconds = priced(plan.key.latent_width, plan.size)
        for trajectory in plan.trajectories:
            self.seconds[trajectory.owner] += seconds * trajectory.rows / plan.rows
        self.planner.advance(plan)
        if plan.stage is Stage.DECODE:
            for trajectory in plan.trajectories:
                trajectory.image = cast(Any, 0)
        self.now += seconds
        self.plans.append(plan)
        return self.planner.record(plan, StepResult(seconds), self.now)

    def until(self, *members: Trajectory) -> float:
        """Seconds until all of `members` are done."""
        began, left = self.now, set(members)
        while left:
            left.difference_update(self.call())
        return self.now - began


class WithoutOwners(Planner):
    """Everybody's images go as those of one owner do."""

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        members = list(trajectories)
        for member in members:
            member.owner = None
        super().add(members)


@pytest.mark.parametrize("owner", [None, "a"])
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 12), st.integers(1, 2), st.integers(1, 2)),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 5),
)
def test_a_single_owner_changes_no_plan(
    owner: str | None, mix: list[tuple[int, int, int, int]], max_images: int
) -> None:
    def plans(make: type[Planner]) -> list[tuple[Stage, list[int]]]:
        arriving = sorted(mix)
        members = [
            make_trajectory(steps, rows=rows, side=8 * size, owner=owner)
            for _, steps, rows, size in arriving
        ]
        served, made = Served(max_images, make=make), []
        for number in range(2000):
            served.add(*(m for m, (at, *_) in zip(members, arriving, strict=True) if at == number))
            if served.planner.plan() is not None:
                served.call()
                plan = served.plans[-1]
                made.append((plan.stage, [members.index(t) for t in plan.trajectories]))
            elif number > 30:
                break
        assert all(member.finished for member in members)
        return made

    assert plans(Planner) == plans(WithoutOwners)


def test_a_single_image_joins_the_next_call_however_many_another_owner_has() -> None:
    served = Served(4, (8,))
    served.add(*(make_trajectory(20, owner="many") for _ in range(100)))
    served.call()
    one = make_trajectory(4, owner="one")
    served.add(one)
    del served.plans[:]
    served.until(one)
    calls = [plan for plan in served.plans if plan.stage is Stage.STEP]
    assert all(one in plan.trajectories for plan in calls)
    assert all(plan.rows == 8 for plan in calls)  # the others fill what it leaves


@pytest.mark.parametrize("sides", [(8, 8), (8, 16), (16, 8)])
def test_owners_with_many_images_get_equal_shares_of_the_device(sides: tuple[int, int]) -> None:
    served = Served(4, tuple(set(sides)))
    for owner, side in zip("ab", sides, strict=True):
        served.add(*(make_trajectory(50, owner=owner, side=side) for _ in range(20)))
    for _ in range(200):
        served.call()
    assert abs(served.seconds["a"] - served.seconds["b"]) <= priced(16, 8)


def test_sixteen_images_take_twice_as_long_beside_an_owner_with_a_hundred() -> None:
    def seconds(num_others: int) -> float:
        served = Served(4, (8,))
        served.add(*(make_trajectory(20, owner="many") for _ in range(num_others)))
        mine = [make_trajectory(10, owner="mine") for _ in range(16)]
        served.add(*mine)
        return served.until(*mine)

    assert seconds(100) == pytest.approx(2 * seconds(0), rel=0.05)


def test_no_image_starves_while_its_owners_others_join_somebody_else() -> None:
    served = Served(4, (8, 16))
    large = make_trajectory(10, side=16, owner="many")
    served.add(large)
    while not large.finished:
        waiting = Counter(t.owner for t in served.planner._active)
        served.add(*(make_trajectory(4, owner="many") for _ in range(12 - waiting["many"])))
        served.add(*(make_trajectory(4, owner="one") for _ in range(1 - waiting["one"])))
        served.call()
        assert served.now < 20, "the large image starves"


def test_images_are_decoded_with_those_of_other_owners_first() -> None:
    done = finished(5)
    for trajectory, owner in zip(done, "aaaab", strict=True):
        trajectory.owner = owner
    planner = planner_with(*done, max_images=2)
    assert {t.owner for t in next_plan(planner).trajectories} == {"a", "b"}


@settings(max_examples=40)
@given(st.randoms(use_true_random=False))
def test_each_step_waits_for_about_one_call_of_every_other_owner(rng: Random) -> None:
    sides, others, num_steps = (8, 12, 16), rng.randint(1, 3), rng.choice([1, 4, 20])
    served = Served(rng.choice([1, 2, 4]), sides)
    wanted = {str(owner): rng.choice([1, 3, 20]) for owner in range(others)}

    def call() -> list[Trajectory]:
        waiting = Counter(trajectory.owner for trajectory in served.planner._active)
        for owner, count in wanted.items():
            for _ in range(count - waiting[owner]):
                side, rows = rng.choice(sides), rng.choice([1, 2])
                steps = rng.choice([1, 5, 20])
                served.add(make_trajectory(steps, owner=owner, side=side, rows=rows))
        return served.call()

    for _ in range(rng.randint(0, 30)):
        call()
    one, began, decoding = make_trajectory(num_steps, owner="one"), served.now, 0.0
    served.add(one)
    while one not in call():
        plan = served.plans[-1]
        if plan.stage is Stage.DECODE:
            decoding += priced(plan.key.latent_width, plan.size)
    longest = priced(16, 2 * served.planner.max_images)
    assert served.now - began - decoding <= (others + 1) * (num_steps + 2) * longest


@pytest.mark.parametrize(
    ("num_mine", "num_others", "side"),
    [(1, 0, 8), (4, 0, 8), (20, 0, 8), (1, 3, 8), (1, 50, 8), (1, 50, 16), (8, 50, 8), (8, 50, 16)],
)
def test_the_eta_knows_what_other_owners_get(num_mine: int, num_others: int, side: int) -> None:
    served = Served(4, (8, 16))
    served.add(*(make_trajectory(20, owner="many", side=side) for _ in range(num_others)))
    for _ in range(min(num_others, 2)):
        served.call()
    mine = [make_trajectory(20, owner="mine") for _ in range(num_mine)]
    served.add(*mine)
    eta = served.planner.eta(mine)
    assert eta == pytest.approx(served.until(*mine), rel=0.2)


def test_the_eta_counts_no_more_company_than_there_is_work_for() -> None:
    served = Served(4, (8,))
    served.add(*(make_trajectory(1, owner="many") for _ in range(3)))
    mine = make_trajectory(50, owner="mine")
    served.add(mine)
    eta = served.planner.eta([mine])
    assert eta == pytest.approx(served.until(mine), rel=0.2)


def backlog(rng: Random, served: Served, count: int, owner: str | None = None) -> list[Trajectory]:
    """Heavy requests of all kinds that are there already, some of them for long."""
    heavy = []
    for _ in range(count):
        steps, rows = rng.choice([150, 400]), rng.choice([1, 2])
        one = make_trajectory(steps, rows=rows, side=rng.choice([8, 16]), owner=owner)
        heavy.append(one)
    served.add(*heavy)
    for one in heavy:
        one.submitted -= rng.choice([0.0, 30.0, 10_000.0])
    return heavy


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_light_request_waits_in_proportion_to_its_work_behind_any_backlog(rng: Random) -> None:
    served = Served(rng.choice([1, 4]), (8, 16))
    backlog(rng, served, rng.choice([1, 5, 30]))
    for _ in range(rng.randint(0, 20)):
        served.call()
    for _ in range(3):  # one after the other: they take less than their part of the device
        light = make_trajectory(rng.choice([1, 4]), rows=rng.choice([1, 2]))
        served.add(light)
        alone, longest = served.planner.seconds_alone(light), priced(16, 8)
        assert served.until(light) <= (GRACE + (1 + PRICE) * CROWD) * alone + 3 * longest


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_heavy_request_keeps_its_part_of_the_device_in_any_flood_of_light_ones(
    rng: Random,
) -> None:
    served = Served(rng.choice([1, 4]), (8, 16))
    heavy = make_trajectory(40, side=16)
    served.add(heavy)
    seconds = {True: 0.0, False: 0.0}  # by whether calls were led by who passed
    while not heavy.finished:
        num_missing = 20 - len(served.planner._active)
        served.add(*(make_trajectory(rng.choice([1, 1, 4])) for _ in range(num_missing)))
        began = served.now
        served.call()
        seconds[served.plans[-1].passes_older] += served.now - began
        assert seconds[True] <= seconds[False] / PRICE + priced(16, 8)
        assert served.now < 60, "the heavy request starves"


def test_sixteen_images_of_a_request_count_together() -> None:
    served = Served(1, (8,))
    first = [make_trajectory(4) for _ in range(16)]
    for one in first:
        one.num_images = 16
    heavy, single = make_trajectory(150), make_trajectory(4)
    served.add(heavy, *first)
    heavy.submitted -= 1000.0
    served.add(single)
    served.until(single)
    assert not any(one.finished for one in first)


def test_who_cancels_and_sends_again_gains_nothing() -> None:
    def seconds(again: int) -> float:
        served = Served(1, (8, 16))
        served.add(*(make_trajectory(200, side=16) for _ in range(5)))
        light, began = make_trajectory(4), served.now
        served.add(light)
        for _ in range(again):
            served.call()
            served.planner.remove([light])
            light = make_trajectory(4)
            served.add(light)
        served.until(light)
        return served.now - began

    assert seconds(0) <= seconds(3) < seconds(10)


def test_a_call_of_several_images_takes_a_second_at_most() -> None:
    sides = (8, 64)
    served = Served(8, sides)
    served.add(*(make_trajectory(3, side=side) for side in sides * 8))
    while served.planner.plan() is not None:
        served.call()
    assert all(
        len(plan.trajectories) == 1 or priced(plan.key.latent_width, plan.size) <= CALL_SECONDS
        for plan in served.plans
    )
    assert max(len(plan.trajectories) for plan in served.plans) > 1


def test_a_size_that_was_never_timed_is_tried_in_small_calls() -> None:
    served = Served(8, (8,))
    members = [make_trajectory(3, side=32) for _ in range(8)]
    served.add(*members)
    expected = served.planner.cost.seconds(members[0].key, Stage.STEP, 16)
    assert UNTRIED * CALL_SECONDS < expected < CALL_SECONDS * 10
    assert len(next_plan(served.planner).trajectories) < 8


def test_in_a_pause_of_a_long_plan_only_what_goes_before_the_rest_of_it_runs() -> None:
    served = Served(4, (8, 64, 128))
    large, other = make_trajectory(3, side=128), make_trajectory(3, side=64)
    served.add(large)
    large.submitted -= 1000.0
    long = next_plan(served.planner)
    served.add(other)
    small = make_trajectory(1)
    served.add(small)
    planner = served.planner
    planner.pause(long, 0.2)
    assert planner.plan(within=long) is None  # nobody is overdue
    served.now += 10.0
    between = planner.plan(within=long)
    assert between is not None
    assert between.trajectories == (small,)
    planner.advance(between)
    planner.record(between, StepResult(0.5), served.now)
    planner.pause(long, 0.2)
    assert planner.plan(within=long) is None  # the long plan is owed for what it has waited
    planner.pause(long, PRICE * 0.5)
    assert planner.plan(within=long) is not None


def test_in_a_pause_another_owner_gets_its_share() -> None:
    served = Served(4, (8, 128))
    large, small = make_trajectory(3, side=128, owner="a"), make_trajectory(9, owner="b")
    served.add(large)
    long = next_plan(served.planner)
    served.add(small)
    served.planner.pause(long, 0.2)
    between = served.planner.plan(within=long)
    assert between is not None
    assert between.trajectories == (small,)


def test_an_image_to_encode_counts_as_work_and_is_encoded_apart_from_others() -> None:
    served = Served(4, (8, 64))
    plain, encoding, another = (make_trajectory(4, side=64) for _ in range(3))
    for one in (encoding, another):
        one.passes = (replace(one.current, encodes=True),)
    planner = served.planner
    assert planner.seconds_alone(encoding) == planner.seconds_alone(plain) + priced(64, 1)
    planner.add([encoding, another])
    plan = next_plan(planner)
    assert plan.stage is Stage.PREPARE
    assert len(plan.trajectories) == 1
    assert planner.expected_seconds(plan) == priced(64, 1)


@pytest.mark.parametrize("num_heavy", [1, 10, 40])
def test_the_eta_knows_that_a_light_request_passes(num_heavy: int) -> None:
    served = Served(4, (8, 16))
    served.add(*(make_trajectory(150, side=16) for _ in range(num_heavy)))
    served.call()
    light = make_trajectory(4)
    served.add(light)
    eta = served.planner.eta([light])
    assert eta == pytest.approx(served.until(light), rel=0.5)


def test_what_is_kept_of_each_size_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(4)
    for side in range(1, 2 * MAX_CURVES):
        one = make_trajectory(2, side=side)
        plan = StepPlan(Stage.STEP, one.key, (one,))
        planner.advance(plan)
        planner.shrink(plan)
    assert len(planner._caps) == len(planner._num_plans) == MAX_CURVES
