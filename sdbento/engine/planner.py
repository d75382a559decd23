"""Decides who advances next, and records what came of it. Imports no torch, knows no requests.

`plan` picks one stage for trajectories that share a BatchKey. Once it is launched, `advance` counts
its steps, so that the next can be planned while the device works; `record` learns from its result.

A trajectory is the more urgent the less work it has left and the longer it has waited. Of all the
batches that could run, the one with the most urgency for each second it takes does. So a 4-step
image overtakes a 50-step one, and a full batch goes before one that is half empty. Nobody starves:
the time waited grows without bound, the remaining work does not.

Pausing a trajectory costs nothing, since its state is a few latents. Every plan is therefore made
from scratch, and nobody keeps a place in the batch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from sdbento.engine.caps import Cap
from sdbento.engine.cost import CostModel
from sdbento.engine.trajectory import BatchKey, Pass, Stage, StepPlan, StepResult, Trajectory
from sdbento.errors import DeadlineExceeded, SDBentoError

AGING = 10.0  # waiting as long as this many typical images take quadruples the urgency
ROWS_PER_IMAGE = 2  # at most: with guidance
DECODE_PIXELS = 4 * 128**2  # latent pixels: in the VAE 8 images of 1024x1024 have 2^31 elements
EXPLORE_EVERY = 64  # plans of a key until one is filled to the bound instead of the knee


class Planner:
    """Decides for all runnable trajectories, i.e. those whose model is resident.

    `max_images` bounds the images in one UNet call. Used on the engine's thread only.
    """

    def __init__(self, max_images: int, cost: CostModel | None = None) -> None:
        self.max_images = max_images
        self.cost = cost or CostModel()
        self._active: dict[Trajectory, None] = {}  # an ordered set: oldest first
        self._decoding: set[Trajectory] = set()  # launched, and the image is not there yet
        self._caps: dict[tuple[BatchKey, Stage], Cap] = {}  # where memory was too small
        self._num_plans: Counter[BatchKey] = Counter()
        self._aging_seconds = AGING  # set anew for every plan

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        self._active.update(dict.fromkeys(trajectories))

    def remove(self, trajectories: Iterable[Trajectory]) -> None:
        """Forget trajectories, e.g. cancelled ones. Unknown ones are ignored."""
        for trajectory in trajectories:
            self._active.pop(trajectory, None)
            self._decoding.discard(trajectory)

    def plan(self, now: float) -> StepPlan | None:
        """The next plan, or None when nobody can advance."""
        groups: dict[BatchKey, list[Trajectory]] = defaultdict(list)
        for trajectory in self._active:
            if trajectory in self._decoding:
                continue
            if trajectory.stage is Stage.DECODE:  # short work that frees the batch
                return self._decode(trajectory.key)
            groups[trajectory.key].append(trajectory)
        self._aging_seconds = self._typical_wait()
        plans = [self._fill(key, members, now) for key, members in groups.items()]
        best = max(plans, key=lambda plan: self._worth(plan, now), default=None)
        return best and self._prepare_new(best)

    def advance(self, plan: StepPlan) -> None:
        """A plan was launched: its trajectories are one step further, or being decoded."""
        if plan.stage is Stage.STEP:
            self._num_plans[plan.key] += 1
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

    def eta(self, trajectories: Iterable[Trajectory]) -> float:
        """Seconds until all of `trajectories` are done, whether they run already or arrive now.

        Those with less work go first, and an image that runs alone takes longer than its share of a
        full batch.
        """
        mine = list(trajectories)
        most = max(self.work(trajectory) for trajectory in mine)
        others = (t for t in self._active if t not in mine)
        ahead = sum(work for t in others if (work := self.work(t)) <= most)
        own = sum(self.work(trajectory) for trajectory in mine)
        return ahead + max(own, max(self.seconds_alone(trajectory) for trajectory in mine))

    def seconds_alone(self, trajectory: Trajectory) -> float:
        """Seconds that `trajectory` needs if it has the device for itself."""
        return sum(_alone(*part, self.cost.seconds) for part in trajectory.remaining)

    def expected_seconds(self, plan: StepPlan) -> float:
        """Seconds that the device will take for `plan`; 0 for preparing, which is not measured."""
        if plan.stage is Stage.PREPARE:
            return 0.0
        return self.cost.seconds(plan.key, plan.stage, plan.size)

    def lower_bound(self, trajectory: Trajectory) -> float:
        """Seconds that it needs at least: what was never measured counts as nothing."""
        return sum(_alone(*part, self.cost.lower_bound) for part in trajectory.remaining)

    def _decode(self, key: BatchKey) -> StepPlan:
        finished = [
            t
            for t in self._active
            if t.key == key and t.stage is Stage.DECODE and t not in self._decoding
        ]
        return StepPlan(Stage.DECODE, key, tuple(finished[: self._max_size(key, Stage.DECODE)]))

    def _fill(self, key: BatchKey, members: list[Trajectory], now: float) -> StepPlan:
        """The most urgent members, up to the knee of the cost curve; always at least one.

        Now and then up to the bound instead: otherwise a single disturbed timing could keep the
        knee low for ever.
        """
        bound = self._max_size(key, Stage.STEP)
        explore = self._num_plans[key] % EXPLORE_EVERY == EXPLORE_EVERY - 1
        knee = bound if explore else self.cost.knee(key, bound)
        ranked = sorted(members, key=lambda t: -self._urgency(t, now))
        chosen, rows = ranked[:1], ranked[0].rows
        for trajectory in ranked[1:]:
            if len(chosen) < self.max_images and rows + trajectory.rows <= knee:
                chosen.append(trajectory)
                rows += trajectory.rows
        return StepPlan(Stage.STEP, key, tuple(chosen))

    def _work(self, one: Pass, step: int = 0) -> float:
        """Seconds of what is left of a pass from `step` on, in full batches."""
        seconds = self.cost.seconds(one.key, Stage.DECODE, 1)
        for key, rows, num_calls in one.remaining_calls(step):
            per_row = self.cost.seconds_per_row(key, self._max_size(key, Stage.STEP))
            seconds += num_calls * rows * per_row
        return seconds

    def _urgency(self, trajectory: Trajectory, now: float) -> float:
        age = max(0.0, now - trajectory.submitted)
        return (1 + age / self._aging_seconds) ** 2 / self.work(trajectory)

    def _typical_wait(self) -> float:
        """AGING times the harmonic mean of all work, which one long trajectory hardly moves."""
        works = [self._work(t.current) for t in self._active]
        return AGING * len(works) / sum(1 / work for work in works) if works else AGING

    def _worth(self, plan: StepPlan, now: float) -> float:
        urgency = sum(self._urgency(trajectory, now) for trajectory in plan.trajectories)
        return urgency / self.cost.seconds(plan.key, Stage.STEP, plan.rows)

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
        return StepPlan(Stage.PREPARE, plan.key, unprepared[:bound])

    def _expire(self, now: float) -> list[Trajectory]:
        late = [t for t in self._active if now > t.deadline]
        for trajectory in late:
            trajectory.error = _late(trajectory)
        self.remove(late)
        return late


def _alone(one: Pass, step: int, price: Callable[[BatchKey, Stage, int], float]) -> float:
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
