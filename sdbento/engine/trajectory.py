"""The shared vocabulary of planner, runner and engine; no logic beyond a trajectory's counter.

A *trajectory* is the path of one image from noise to picture. It joins and leaves the running
batch between two denoising steps, so its whole life is one counter, `step`, and what the runner
keeps for it (`state`). A step costs `rows` rows of a UNet call: two with guidance, one without.
A picture that takes two models or two sizes is a chain: the successor goes on where the
predecessor has finished.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sdbento.errors import SDBentoError
    from sdbento.lora.hooks import WeightedAdapter
    from sdbento.models.pipeline import ControlNet
    from sdbento.prompts.encoder import PreparedPrompt
    from sdbento.samplers.step_table import StepTable


@dataclass(frozen=True)
class BatchKey:
    """Who may share a UNet call: trajectories whose keys are equal, and nothing else matters."""

    model: str
    latent_height: int
    latent_width: int
    text_chunks: int = 1

    @property
    def latent_pixels(self) -> int:
        return self.latent_height * self.latent_width


@dataclass(frozen=True)
class SizeConditioning:
    """SDXL's micro-conditioning (section 2.2 of Podell et al. 2023); all sizes (height, width).

    The refiner reads an aesthetic score in place of the target size.
    """

    original_size: tuple[int, int]
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int]
    aesthetic_score: float | None = None

    @property
    def time_ids(self) -> tuple[float, ...]:
        last = self.target_size if self.aesthetic_score is None else (self.aesthetic_score,)
        return (*self.original_size, *self.crops_coords_top_left, *last)


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet on one image: its residuals are added to that image's rows, scaled."""

    network: ControlNet
    image: Tensor  # [1, 3, H, W] on [0, 1]
    scale: float
    start: float  # shares of the steps; see `within`
    end: float


@dataclass(frozen=True, eq=False)
class Start:
    """What denoising starts from, where that is not noise alone.

    `pixels` None: from what the predecessor made. `mask` 1: repaint.
    """

    pixels: Tensor | None = None  # [1, 3, H, W] on [-1, 1]
    mask: Tensor | None = None  # [1, 1, H, W], 0 or 1
    pure_noise: bool = False  # full strength under a mask: the picture is only kept outside of it
    add_noise: bool = True  # False: the predecessor's latents still carry their noise
    upscaler: str | None = None  # how the predecessor's picture or ("latent") latents grow


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """What one image is made from; set by intake, read by the runner, opaque to the planner.

    Prompts are (first step, prompt) pairs, the first at step 0: prompt editing changes them on the
    way.
    """

    prompts: tuple[tuple[int, PreparedPrompt], ...]
    negative_prompts: tuple[tuple[int, PreparedPrompt], ...]
    seed: int
    guidance_scale: float
    guidance_rescale: float
    table: StepTable
    size: SizeConditioning
    negative_size: SizeConditioning
    start: Start | None = None
    controls: tuple[Control, ...] = ()
    adapters: tuple[WeightedAdapter, ...] = ()


def within(step: int, num_steps: int, start: float, end: float) -> bool:
    """Whether `step` lies between two shares of a run, as diffusers' ControlNet pipelines count."""
    return not (step / num_steps < start or (step + 1) / num_steps > end)


class Stage(StrEnum):
    PREPARE = "prepare"  # encode the prompts, draw the first noise
    STEP = "step"  # one denoising step
    DECODE = "decode"  # latents to picture


@dataclass(eq=False)
class Trajectory:
    """One image under way. Compared by identity: two requests may ask for the very same image."""

    key: BatchKey
    num_steps: int
    guided_steps: range  # the steps that take a second row, for guidance
    inputs: ImageInputs
    submitted: float = 0.0  # monotonic seconds; set by the engine
    deadline: float | None = None  # monotonic seconds
    preview_every: int = 0
    step: int = 0  # UNet evaluations done; set by the planner
    pipeline: Any = None  # the resident model; whoever submits holds its lease
    successor: Trajectory | None = None  # goes on from what this one makes: refiner, hires
    predecessor: Trajectory | None = None  # set with its successor; forgotten when it has begun
    decodes: bool = True  # False: the successor starts from the latents
    state: Any = None  # latents, conditioning, noise generator; owned by the runner
    preview: Image.Image | None = None  # of the last previewed step; set by the runner
    image: Image.Image | None = None  # set by the runner when decoded
    error: SDBentoError | None = None  # set by the planner

    @property
    def stage(self) -> Stage:
        if self.state is None:
            return Stage.PREPARE
        return Stage.STEP if self.step < self.num_steps else Stage.DECODE

    @property
    def finished(self) -> bool:
        """Whether nobody has anything to do for it any more; its successor is another matter."""
        if self.error is not None or self.image is not None:
            return True
        return not self.decodes and self.step == self.num_steps

    @property
    def rows(self) -> int:
        """UNet rows of the next step."""
        return 2 if self.step in self.guided_steps else 1

    @property
    def remaining_steps(self) -> int:
        return self.num_steps - self.step

    @property
    def remaining_guided_steps(self) -> int:
        return len(range(max(self.step, self.guided_steps.start), self.guided_steps.stop))

    @property
    def remaining_rows(self) -> int:
        """UNet rows of all steps that are left."""
        return self.remaining_steps + self.remaining_guided_steps

    @property
    def num_rows(self) -> int:
        """UNet rows of all its steps."""
        return self.num_steps + len(self.guided_steps)

    @property
    def chain(self) -> Iterator[Trajectory]:
        """This trajectory and its successors."""
        trajectory: Trajectory | None = self
        while trajectory is not None:
            yield trajectory
            trajectory = trajectory.successor


@dataclass(frozen=True)
class StepPlan:
    """What the runner does next: one stage for trajectories that share a key."""

    stage: Stage
    key: BatchKey
    trajectories: tuple[Trajectory, ...]

    @property
    def rows(self) -> int:
        return sum(trajectory.rows for trajectory in self.trajectories)

    @property
    def size(self) -> int:
        """What its time and memory grow with: rows of a step, images of anything else."""
        return self.rows if self.stage is Stage.STEP else len(self.trajectories)


@dataclass(frozen=True)
class StepResult:
    """What came of a plan: how long it took and whom it failed."""

    seconds: float
    failures: dict[Trajectory, SDBentoError] = field(default_factory=dict)
    split: bool = False  # done in parts, after it had failed as a whole; set by the engine


class Runner(Protocol):
    """The only caller of UNet and VAE. `execute` runs on the engine's thread.

    It either does the whole plan or changes nothing and raises, so that a failed plan can be tried
    again in parts.
    """

    def execute(self, plan: StepPlan) -> StepResult: ...
