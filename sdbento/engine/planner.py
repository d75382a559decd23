"""Decides who advances next, and records what came of it. Imports no torch, knows no requests.

`plan` picks one stage for trajectories that share a BatchKey. Once it is launched, `advance` counts
its steps, so that the next can be planned while the device works; `record` learns from its result.

Trajectories go in order of arrival, except that long ones let short ones pass for a while; those of
several owners take turns (`shares.py`). Whoever shares the BatchKey of the first may join it, as
long as that costs everybody less waiting than it saves (`policy.py`). Nobody starves, since nobody
passes a trajectory of the same owner that came long before, and owners have equal shares.

Pausing a trajectory costs nothing, since its state is a few latents. Every plan is therefore made
from scratch, and nobody keeps a place in the batch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import accumulate
from math import inf

from cachetools import LRUCache

from sdbento.engine.caps import Cap
from sdbento.engine.cost import MAX_CURVES, CostModel
from sdbento.engine.overdue import GRACE, PRICE, Balances, is_overdue
from sdbento.engine.policy import num_together, turn
from sdbento.engine.shares import Shares
from sdbento.engine.trajectory import BatchKey, Owner, Pass, Stage, StepPlan, StepResult, Trajectory
from sdbento.errors import DeadlineExceeded, SDBentoError

ROWS_PER_IMAGE = 2  # at most: with guidance
DECODE_PIXELS = 4 * 128**2  # latent pixels: in the VAE 8 images of 1024x1024 have 2^31 elements
CALL_SECONDS = 1.0  # that a call with several images takes at most: others wait for its end
UNTRIED = 0.25  # of CALL_SECONDS, as long as nothing of its size has been timed often enough
CROWD = 4.0  # times as long as alone: how much company an overdue image gets at most
EXPLORE_EVERY = 64  # plans of a key until one is filled to the bound, whatever it costs


class Planner:
    """Decides for all runnable trajectories, i.e. those whose model is resident.

    `max_images` bounds the images in one UNet call. Used on the engine's thread only.
    """

    def __init__(
        self,
        max_images: int,
        cost: CostModel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_images = max_images
        self.cost = cost or CostModel()
        self._active: dict[Trajectory, None] = {}  # an ordered set: oldest first
        self._decoding: set[Trajectory] = set()  # launched, and the image is not there yet
        # Of the kinds of calls that came last: sizes, and so keys, have no end.
        self._caps: LRUCache[tuple[BatchKey, Stage], Cap] = LRUCache(MAX_CURVES)  # of memory
        self._num_plans: LRUCache[BatchKey, int] = LRUCache(MAX_CURVES)
        self._shares = Shares()
        self._balances = Balances()
        self._paused: tuple[StepPlan, float] | None = None  # the last, and its seconds until then
        self._clock = clock

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        self._active.update(dict.fromkeys(trajectories))

    def remove(self, trajectories: Iterable[Trajectory]) -> None:
        """Forget trajectories, e.g. cancelled ones. Unknown ones are ignored."""
        for trajectory in trajectories:
            self._active.pop(trajectory, None)
            self._decoding.discard(trajectory)

    def plan(self, within: StepPlan | None = None) -> StepPlan | None:
        """The next plan, or None when nobody can advance.

        `within`: a long one that has paused (see `pause`). Then the next is a short one that goes
        before the rest of it, if there is any.
        """
        waiting = [trajectory for trajectory in self._active if trajectory not in self._decoding]
        self._shares.update(waiting)
        self._balances.keep({trajectory.owner for trajectory in waiting})
        busy = () if within is None else within.trajectories
        if busy:
            waiting = [t for t in waiting if t in busy or self._is_short(t)]
        if not waiting:
            return None
        overdue = self._overdue(waiting)
        passing = {t: need for t, need in overdue.items() if self._balances.may_pass(t.owner)}
        queue, in_order = self._queue(waiting, passing), self._queue(waiting, {})
        if queue[0] in busy:
            return None
        if queue[0] is in_order[0] or queue[0] not in passing:
            passing = {}
        others = [trajectory for trajectory in queue if trajectory not in busy]
        finished = [trajectory for trajectory in others if trajectory.stage is Stage.DECODE]
        if finished and (not passing or others[0] is finished[0]):
            first = in_order[0]  # short work that frees the batch
            passes = overdue.get(finished[0], inf) < self._need(first.passes, first.num_images)
            return self._decode(finished, passes_older=bool(passing) or passes)
        stepping = [trajectory for trajectory in others if trajectory.stage is not Stage.DECODE]
        return self._prepare_new(self._step(stepping, passing))

    def pause(self, plan: StepPlan, seconds: float) -> None:
        """A long plan, which is being launched, has run for `seconds` since it paused last."""
        before = self._seconds_charged(plan)
        self._shares.charge(plan, seconds)
        self._balances.charge(plan.trajectories[0].owner, seconds, passed=plan.passes_older)
        self._paused = plan, before + seconds

    def advance(self, plan: StepPlan) -> None:
        """A plan was launched: its trajectories are one step further, or being decoded."""
        if plan.stage is not Stage.PREPARE:
            charged = self._seconds_charged(plan)
            self._shares.charge(plan, max(0.0, self.expected_seconds(plan) - charged))
        if plan.stage is Stage.STEP:
            self._num_plans[plan.key] = self._num_plans.get(plan.key, 0) + 1
            for trajectory in plan.trajectories:
                trajectory.step += 1
                if trajectory.pass_finished and trajectory.has_next_pass:
                    trajectory.begin_next_pass()
        elif plan.stage is Stage.DECODE:
            self._decoding.update(plan.trajectories)

    def record(
        self, plan: StepPlan, result: StepResult, now: float, *, learn: bool = True
    ) -> list[Trajectory]:
        """Record the result of a plan; returns the trajectories that have ended, failed or done.

        `learn` False: its seconds say nothing of other plans. Trajectories that were removed in the
        meantime are ignored.
        """
        if learn and not result.failures:
            self._learn(plan, result.seconds)
        self._charge(plan, result.seconds)
        self._decoding.difference_update(plan.trajectories)
        members = [trajectory for trajectory in plan.trajectories if trajectory in self._active]
        for trajectory in members:
            trajectory.error = result.failures.get(trajectory)
            decoded = plan.stage is Stage.DECODE and trajectory.error is None
            if decoded and trajectory.has_next_pass:
                trajectory.begin_next_pass()
        ended = [trajectory for trajectory in members if trajectory.finished]
        self.remove(ended)
        return ended + self._expire(now)

    def shrink(self, plan: StepPlan) -> None:
        """The device ran out of memory on `plan`: smaller ones of its key and stage from now on."""
        step = ROWS_PER_IMAGE if plan.stage is Stage.STEP else 1
        self._caps.setdefault((plan.key, plan.stage), Cap(plan.size, step)).failed(plan.size)

    def work(self, trajectory: Trajectory) -> float:
        """Seconds of device time that `trajectory` still needs in a full batch."""
        return sum(self._work(one, step) for one, step in trajectory.remaining)

    def known_work(self, trajectory: Trajectory) -> float:
        """As `work`; inf as long as no such steps were timed, when it would be a mere guess."""
        return self.work(trajectory) if self.cost.is_timed(trajectory.key, Stage.STEP) else inf

    def eta(self, trajectories: Iterable[Trajectory]) -> float:
        """Seconds until all of `trajectories`, images of one owner, are done.

        They run already or arrive now. Ahead of them are images of the same owner; what other
        owners get meanwhile are rows in the same calls, and calls of their own up to their share.
        """
        mine = list(trajectories)
        owner, last = mine[0].owner, max(self._turn(trajectory) for trajectory in mine)
        ours = {*mine}
        active = [trajectory for trajectory in self._active if trajectory not in ours]
        ahead = sum(self.work(t) for t in active if t.owner == owner and self._turn(t) <= last)
        others = [trajectory for trajectory in active if trajectory.owner != owner]
        work: defaultdict[Owner, float] = defaultdict(float)
        for trajectory in others:
            work[trajectory.owner] += self.work(trajectory)
        calls, theirs = self._in_company(mine, others, sum(work.values()))
        own = max(calls, sum(self.work(trajectory) for trajectory in mine))
        # Once it is overdue it has its part of the device.
        ahead = min(ahead, self._until_overdue(mine[0]) + PRICE * own)
        share = self._shares.seconds_for_others(owner, ahead + own - theirs, work)
        return ahead + own + max(0.0, share - theirs)

    def seconds_alone(self, trajectory: Trajectory) -> float:
        """Seconds that `trajectory` needs if it has the device for itself."""
        return sum(self._alone(*part) for part in trajectory.remaining)

    def expected_seconds(self, plan: StepPlan) -> float:
        """Seconds that the device will take for `plan`. Of preparing only images to encode count:
        an encoder costs about as much as its decoder."""
        if plan.stage is Stage.PREPARE:
            passes = {trajectory.current for trajectory in plan.trajectories}  # one of a request
            return sum(self._beginning(one, 0) for one in passes)
        return self.cost.seconds(plan.key, plan.stage, plan.size)

    def experience(self, plan: StepPlan) -> tuple[float, bool]:
        """Seconds that `plan` may take, and whether calls of its very kind and size were made, and
        those of its kind timed.

        Preparing is not measured: encoding an image is taken to last as long as decoding one.
        """
        if plan.stage is Stage.PREPARE:
            return self.cost.seconds(plan.key, Stage.DECODE, plan.size), False
        key, stage = plan.key, plan.stage
        known = self.cost.is_timed(key, stage) and self.cost.was_called(key, stage, plan.size)
        return self.expected_seconds(plan), known

    def lower_bound(self, trajectory: Trajectory) -> float:
        """Seconds that it needs at least: what was never measured counts as nothing."""
        return sum(_calls(*part, self.cost.lower_bound) for part in trajectory.remaining)

    def _overdue(self, waiting: list[Trajectory]) -> dict[Trajectory, float]:
        """Those that may pass others because they have waited out of proportion to what their
        requests need; and these seconds, by which they go."""
        now, needs = self._clock(), dict[tuple[tuple[Pass, ...], int], float]()
        overdue: dict[Trajectory, float] = {}
        for trajectory in waiting:
            kind = trajectory.passes, trajectory.num_images
            if kind not in needs:
                needs[kind] = self._need(*kind)
            if is_overdue(now - trajectory.submitted, needs[kind]):
                overdue[trajectory] = needs[kind]
        return overdue

    def _until_overdue(self, trajectory: Trajectory) -> float:
        """Seconds until it may pass larger requests of its owner."""
        need = self._need(trajectory.passes, trajectory.num_images)
        return max(0.0, trajectory.submitted + GRACE * need - self._clock())

    def _need(self, passes: tuple[Pass, ...], num_images: int) -> float:
        """Seconds that a request needs in all if it has the device for itself."""
        first = sum(self._alone(one) for one in passes)
        return first + (num_images - 1) * sum(self._work(one) for one in passes)

    def _queue(
        self, waiting: list[Trajectory], overdue: dict[Trajectory, float]
    ) -> list[Trajectory]:
        """All in the order in which they go: of each owner those that are overdue first, and with
        each owner's share of the device in mind."""
        queue = sorted(waiting, key=lambda one: (overdue.get(one, inf), self._turn(one)))
        return self._shares.order(queue, self._seconds_of_step)

    def _seconds_of_step(self, trajectory: Trajectory) -> float:
        """Its share of the seconds of a full batch."""
        bound = self._max_size(trajectory.key, Stage.STEP)
        return trajectory.rows * self.cost.seconds_per_row(trajectory.key, bound)

    def _in_company(
        self, mine: list[Trajectory], others: list[Trajectory], work: float
    ) -> tuple[float, float]:
        """Seconds until `mine` are done if nobody has calls that they take no part in, and how many
        of these seconds are for rows of `others`.

        As many of the others join as would join now, until their `work` is done.
        """
        rows: defaultdict[BatchKey, list[int]] = defaultdict(list)
        for trajectory in others:
            rows[trajectory.key].append(trajectory.rows)
        alone = together = theirs = 0.0
        longest = max(mine, key=self.seconds_alone)
        for key, own, num_calls in longest.remaining_calls:
            queue = [own] * len(mine) + rows[key]
            chosen = queue[: self._num_together(key, queue, len(others) - len(rows[key]))]
            rows_mine = own * min(len(mine), len(chosen))
            seconds = num_calls * self.cost.seconds(key, Stage.STEP, sum(chosen))
            alone += num_calls * self.cost.seconds(key, Stage.STEP, rows_mine)
            together += seconds
            theirs += seconds * (1 - rows_mine / sum(chosen))
        part = min(1.0, work / theirs) if theirs else 0.0
        decoding = sum(self.cost.seconds(one.key, Stage.DECODE, 1) for one, _ in longest.remaining)
        return decoding + alone + part * (together - alone), part * theirs

    def _is_short(self, trajectory: Trajectory) -> bool:
        """Whether its next call, if it has no company, may run while another one pauses."""
        alone = StepPlan(trajectory.stage, trajectory.key, (trajectory,))
        return self.expected_seconds(alone) <= CALL_SECONDS

    def _decode(self, finished: list[Trajectory], *, passes_older: bool) -> StepPlan:
        key = finished[0].key
        same = [trajectory for trajectory in finished if trajectory.key == key]
        most = self._num_short(key, Stage.DECODE, [1] * len(same))
        return StepPlan(Stage.DECODE, key, tuple(same[:most]), passes_older)

    def _step(self, queue: list[Trajectory], overdue: dict[Trajectory, float]) -> StepPlan:
        """A step of the first in the queue, and of those that should join it.

        Now and then of all that may join: otherwise a single disturbed timing could make large
        batches look dear for ever. `overdue` is empty unless the first passes older ones.
        """
        key = queue[0].key
        same = [trajectory for trajectory in queue if trajectory.key == key]
        rows = [trajectory.rows for trajectory in same]
        if overdue:
            num_chosen = self._num_together(key, rows, len(queue) - len(same))
            num_chosen = min(num_chosen, self._num_in_crowd(same, overdue))
        elif self._num_plans.get(key, 0) % EXPLORE_EVERY == EXPLORE_EVERY - 1:
            num_chosen = self._num_fitting(key, rows)
        else:
            num_chosen = self._num_together(key, rows, len(queue) - len(same))
        return StepPlan(Stage.STEP, key, tuple(same[:num_chosen]), passes_older=bool(overdue))

    def _num_in_crowd(self, same: list[Trajectory], overdue: dict[Trajectory, float]) -> int:
        """How many may join the first, which is overdue: others like it, and else as many as make
        its call no longer than CROWD times one alone."""
        largest = CROWD * overdue[same[0]]
        num_alike = sum(overdue.get(trajectory, inf) <= largest for trajectory in same)
        price = [
            self.cost.seconds(same[0].key, Stage.STEP, rows)
            for rows in accumulate(trajectory.rows for trajectory in same[: self.max_images])
        ]
        return max(num_alike, sum(seconds <= CROWD * price[0] for seconds in price))

    def _num_together(self, key: BatchKey, rows: list[int], others: int) -> int:
        """How many of the first should share a call, by the rows of each in the queue of `key`."""
        return num_together(
            rows,
            self._num_fitting(key, rows),
            others,
            lambda rows: self.cost.seconds(key, Stage.STEP, rows),
            self.cost.knee(key, self._max_size(key, Stage.STEP)),
        )

    def _num_fitting(self, key: BatchKey, rows: list[int]) -> int:
        """How many of the first a call of `key` can take; always at least one."""
        return self._num_short(key, Stage.STEP, rows[: self.max_images])

    def _num_short(self, key: BatchKey, stage: Stage, sizes: list[int]) -> int:
        """How many of the first a call can take within its bounds of size and of seconds; always at
        least one."""
        bound = self._max_size(key, stage)
        longest = CALL_SECONDS if self.cost.is_timed(key, stage) else UNTRIED * CALL_SECONDS
        totals = accumulate(sizes[:bound])
        return max(
            1,
            sum(
                total <= bound and self.cost.seconds(key, stage, total) <= longest
                for total in totals
            ),
        )

    def _alone(self, one: Pass, step: int = 0) -> float:
        """Seconds of what is left of a pass from `step` on, with no company."""
        return self._beginning(one, step) + _calls(one, step, self.cost.seconds)

    def _beginning(self, one: Pass, step: int) -> float:
        """Seconds until the first step of a pass."""
        encodes = one.encodes and step == 0
        return self.cost.seconds(one.key, Stage.DECODE, 1) if encodes else 0.0

    def _work(self, one: Pass, step: int = 0) -> float:
        """Seconds of what is left of a pass from `step` on, in full batches."""
        seconds = self._beginning(one, step) + self.cost.seconds(one.key, Stage.DECODE, 1)
        for key, rows, num_calls in one.remaining_calls(step):
            per_row = self.cost.seconds_per_row(key, self._max_size(key, Stage.STEP))
            seconds += num_calls * rows * per_row
        return seconds

    def _turn(self, trajectory: Trajectory) -> float:
        return turn(trajectory.submitted, self.seconds_alone(trajectory))

    def _charge(self, plan: StepPlan, seconds: float) -> None:
        """A plan has taken so long; for preparing it is known only now."""
        left = max(0.0, seconds - self._seconds_charged(plan))
        self._balances.charge(plan.trajectories[0].owner, left, passed=plan.passes_older)
        if plan.stage is Stage.PREPARE:
            self._shares.charge(plan, left)

    def _seconds_charged(self, plan: StepPlan) -> float:
        """What was charged for a plan when it paused."""
        return self._paused[1] if self._paused is not None and self._paused[0] is plan else 0.0

    def _learn(self, plan: StepPlan, seconds: float) -> None:
        if plan.stage is not Stage.PREPARE:
            self.cost.observe(plan.key, plan.stage, plan.size, seconds)
        cap = self._caps.get((plan.key, plan.stage))
        if cap is not None:
            cap.succeeded(plan.size)

    def _max_size(self, key: BatchKey, stage: Stage) -> int:
        """The bound of `StepPlan.size`."""
        bound = self.max_images
        if stage is Stage.STEP:
            bound *= ROWS_PER_IMAGE
        elif stage is Stage.DECODE:
            bound = min(bound, max(1, DECODE_PIXELS // key.latent_pixels))
        cap = self._caps.get((key, stage))
        return bound if cap is None else min(bound, cap.limit)

    def _prepare_new(self, plan: StepPlan) -> StepPlan:
        """Trajectories that were chosen to step but have not begun are prepared first. The others
        that wait are not prepared yet, since encoding an image takes as long as a step."""
        unprepared = tuple(t for t in plan.trajectories if t.stage is Stage.PREPARE)
        if not unprepared:
            return plan
        bound = self._max_size(plan.key, Stage.PREPARE)
        first = StepPlan(Stage.PREPARE, plan.key, unprepared[:1], plan.passes_older)
        whole = replace(first, trajectories=unprepared[:bound])
        return whole if self.expected_seconds(whole) <= CALL_SECONDS else first

    def _expire(self, now: float) -> list[Trajectory]:
        late = [t for t in self._active if now > t.deadline]
        for trajectory in late:
            trajectory.error = _late(trajectory)
        self.remove(late)
        return late


def _calls(one: Pass, step: int, price: Callable[[BatchKey, Stage, int], float]) -> float:
    """Seconds of what is left of a pass from `step` on, with no company, by the price of a call."""
    calls = one.remaining_calls(step)
    seconds = sum(num_calls * price(key, Stage.STEP, rows) for key, rows, num_calls in calls)
    return seconds + price(one.key, Stage.DECODE, 1)


def _late(trajectory: Trajectory) -> SDBentoError:
    seconds = trajectory.deadline - trajectory.submitted
    return DeadlineExceeded(
        f"not done within its timeout of {seconds:g} s "
        f"(step {trajectory.steps_done} of {trajectory.steps_in_all})",
        param="timeout",
    )
