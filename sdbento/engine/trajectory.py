"""The shared vocabulary of planner, runner and engine; no logic beyond a trajectory's counters.

A *trajectory* is the path of one image from noise to pixels. It joins and leaves the running batch
between two denoising steps: where it stands is told by two counters, `pass_index` and `step`, and
by what the runner keeps for it (`state`). A step costs `rows` rows of a UNet call: two with
guidance, one without.

A *pass* is one run of a sampler. Most images take one; a refiner or a second, larger size is a
second pass, which goes on from what the first has made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL import Image

    from sdbento.engine.inputs import PassInputs
    from sdbento.errors import SDBentoError
    from sdbento.models.pipeline import Pipeline
    from sdbento.runner.state import State


@dataclass(frozen=True)
class BatchKey:
    """Who may share a UNet call: trajectories whose keys are equal, and nothing else matters."""

    model: str
    latent_height: int
    latent_width: int
    text_chunks: int = 1
    token_merging_ratio: float = 0.0
    shallow: bool = False  # of DeepCache: only the UNet's outermost blocks are computed

    @property
    def latent_pixels(self) -> int:
        return self.latent_height * self.latent_width


Owner = str | None  # whose images get equal shares of the device: whoever has sent them
Calls = tuple[BatchKey, int, int]  # UNet calls of a key: the rows of each, and how many


@dataclass(frozen=True, eq=False)
class Pass:
    """One run of a sampler, the same for all images of a request."""

    key: BatchKey
    num_steps: int
    guided_steps: range  # the steps that take a second row, for guidance
    inputs: PassInputs
    pipeline: Pipeline  # resident: whoever submits holds its lease
    decodes: bool = True  # False: the next pass starts from the latents
    deep_cache_interval: int = 1  # the steps from one that computes the whole UNet to the next
    encodes: bool = False  # the VAE encodes an image before the first step
    _calls: dict[int, Sequence[Calls]] = field(default_factory=dict, init=False)

    def key_at(self, step: int) -> BatchKey:
        return self._shallow_key if self.is_shallow(step) else self.key

    def is_shallow(self, step: int) -> bool:
        """Whether a step goes on with what the one before it has kept of the UNet's deep blocks.

        The first with guidance does not: nothing is kept for the row that it adds.
        """
        if self.deep_cache_interval == 1 or step >= self.num_steps:
            return False
        return step % self.deep_cache_interval > 0 and step != self.guided_steps.start

    def rows_at(self, step: int) -> int:
        """UNet rows of a step."""
        return 2 if step in self.guided_steps else 1

    def remaining_calls(self, step: int) -> Sequence[Calls]:
        """The UNet calls from `step` on; counted once, because every plan asks for them."""
        if step not in self._calls:
            self._calls[step] = list(self._count_calls(step))
        return self._calls[step]

    def _count_calls(self, step: int) -> Iterator[Calls]:
        guided = self.guided_steps
        for rows, first, end in (
            (1, step, guided.start),
            (2, max(step, guided.start), guided.stop),
            (1, max(step, guided.stop), self.num_steps),
        ):
            num_steps = len(range(first, end))
            num_whole = self._num_whole(range(first, end))
            if num_whole:
                yield self.key, rows, num_whole
            if num_whole < num_steps:
                yield self._shallow_key, rows, num_steps - num_whole

    def _num_whole(self, steps: range) -> int:
        interval, extra = self.deep_cache_interval, self.guided_steps.start
        first = -(-steps.start // interval) * interval
        regular = len(range(first, steps.stop, interval))
        return regular + (extra in steps and extra % interval > 0)

    @cached_property
    def _shallow_key(self) -> BatchKey:
        return replace(self.key, shallow=True)


class Stage(StrEnum):
    PREPARE = "prepare"  # encode the prompts, draw the first noise
    STEP = "step"  # one denoising step
    DECODE = "decode"  # latents to image


@dataclass(frozen=True, eq=False)
class PassOutcome:
    """What a pass leaves to the next: its latents and generator, and its image if it decodes."""

    state: State
    image: Image.Image | None


@dataclass(eq=False)
class Trajectory:
    """One image under way. Compared by identity: two requests may ask for the very same image."""

    passes: tuple[Pass, ...]
    seed: int
    preview_every: int = 0  # may change while it runs, by its handle
    owner: Owner = None
    num_images: int = 1  # of its request; set by the engine
    submitted: float = 0.0  # monotonic seconds; set by the engine
    deadline: float = inf  # monotonic seconds; set by the engine
    pass_index: int = 0  # set by the planner
    step: int = 0  # UNet evaluations done in this pass; set by the planner
    previous: PassOutcome | None = None  # set by the planner, dropped by the runner once it is used
    state: State | None = None  # latents, conditioning, noise generator; owned by the runner
    preview: Image.Image | None = None  # of the last previewed step; set when its result is read
    image: Image.Image | None = None  # of this pass; set when the result of its decoding is read
    error: SDBentoError | None = None  # set by the planner

    @property
    def current(self) -> Pass:
        return self.passes[self.pass_index]

    @property
    def key(self) -> BatchKey:
        return self.current.key_at(self.step)

    @property
    def inputs(self) -> PassInputs:
        return self.current.inputs

    @property
    def pipeline(self) -> Pipeline:
        return self.current.pipeline

    @property
    def stage(self) -> Stage:
        if self.state is None:
            return Stage.PREPARE
        return Stage.STEP if self.step < self.current.num_steps else Stage.DECODE

    @property
    def rows(self) -> int:
        """UNet rows of the next step."""
        return self.current.rows_at(self.step)

    @property
    def remaining(self) -> Iterator[tuple[Pass, int]]:
        """The passes that are not done, each with the step at which it goes on."""
        yield self.current, self.step
        for later in self.passes[self.pass_index + 1 :]:
            yield later, 0

    @property
    def remaining_calls(self) -> Iterator[Calls]:
        """The UNet calls of all passes that are not done."""
        for one, step in self.remaining:
            yield from one.remaining_calls(step)

    @property
    def steps_done(self) -> int:
        """Of all passes."""
        return sum(done.num_steps for done in self.passes[: self.pass_index]) + self.step

    @property
    def steps_in_all(self) -> int:
        return sum(one.num_steps for one in self.passes)

    @property
    def pass_finished(self) -> bool:
        if self.current.decodes:
            return self.image is not None
        return self.step == self.current.num_steps

    @property
    def has_next_pass(self) -> bool:
        return self.pass_index + 1 < len(self.passes)

    @property
    def finished(self) -> bool:
        """Whether nobody has anything to do for it any more."""
        return self.error is not None or (self.pass_finished and not self.has_next_pass)

    def begin_next_pass(self) -> None:
        """Go on from what the current pass has made."""
        assert self.state is not None
        self.previous = PassOutcome(self.state, self.image)
        self.pass_index += 1
        self.step = 0
        self.state = self.image = None

    def release(self) -> None:
        """Let go of models and tensors, whoever still holds this; image and error stay."""
        self.passes = ()
        self.state = self.previous = None


def image_of(trajectory: Trajectory) -> Image.Image:
    """The image of a trajectory that is done."""
    assert trajectory.image is not None
    return trajectory.image


@dataclass(frozen=True)
class StepPlan:
    """What the runner does next: one stage for trajectories that share a key.

    `rows` is counted when the plan is made, since trajectories move on once it is launched.
    """

    stage: Stage
    key: BatchKey
    trajectories: tuple[Trajectory, ...]
    passes_older: bool = field(default=False, compare=False)  # its first image is `overdue`
    rows: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        rows = sum(trajectory.rows for trajectory in self.trajectories)
        object.__setattr__(self, "rows", rows)  # as dataclasses do it themselves in frozen ones

    @property
    def size(self) -> int:
        """What its time and memory grow with: rows of a step, images of anything else."""
        return self.rows if self.stage is Stage.STEP else len(self.trajectories)


@dataclass(frozen=True)
class StepResult:
    """What came of a plan: how long the device took, and which trajectories failed."""

    seconds: float
    failures: dict[Trajectory, SDBentoError] = field(default_factory=dict)


class Launched(Protocol):
    """A plan that the device has been given. Its states are the next plan's already."""

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> StepResult:
        """Wait for the device, and put images and previews on the trajectories.

        Raises what the device reports. Such an error cannot be undone by trying again: the states
        are those of after the step.
        """


class Runner(Protocol):
    """The only caller of UNet and VAE. Everything runs on the engine's thread."""

    def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        """Begin the whole plan, or change nothing and raise: it can be tried again in parts.

        Where launching is computing, `pause` may be called in its midst, on the same thread. It may
        launch other plans, and raises to end this one.
        """

    def measure(
        self, pipeline: Pipeline, key: BatchKey, rows: int, *, capture: bool = False
    ) -> float:
        """Seconds of one step of `rows` random rows; `capture`: so that later ones are replayed."""

    def measure_decode(self, pipeline: Pipeline, key: BatchKey) -> float:
        """Seconds of decoding one image."""
