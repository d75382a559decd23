"""The shared vocabulary of planner, runner and engine; no logic beyond a trajectory's counter.

A *trajectory* is the path of one image from noise to picture. It joins and leaves the running
batch between two denoising steps, so its whole life is one counter, `step`, and what the runner
keeps for it (`state`). It costs `rows` rows of a UNet call: two with guidance, one without.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image

    from sdbento.errors import SDBentoError
    from sdbento.samplers import StepTable


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
    """SDXL's micro-conditioning (section 2.2 of Podell et al. 2023); all sizes (height, width)."""

    original_size: tuple[int, int]
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int]

    @property
    def time_ids(self) -> tuple[int, ...]:
        return (*self.original_size, *self.crops_coords_top_left, *self.target_size)


@dataclass(frozen=True)
class ImageInputs:
    """What one image is made from; set by intake, read by the runner, opaque to the planner."""

    prompt: str
    negative_prompt: str | None
    seed: int
    guidance_scale: float
    guidance_rescale: float
    table: StepTable
    size: SizeConditioning
    negative_size: SizeConditioning


class Stage(StrEnum):
    PREPARE = "prepare"  # encode the prompts, draw the first noise
    STEP = "step"  # one denoising step
    DECODE = "decode"  # latents to picture


@dataclass(eq=False)
class Trajectory:
    """One image under way. Compared by identity: two requests may ask for the very same image."""

    key: BatchKey
    num_steps: int
    rows: int
    inputs: ImageInputs
    submitted: float = 0.0  # monotonic seconds; set by the engine
    deadline: float | None = None  # monotonic seconds
    preview_every: int = 0
    step: int = 0  # UNet evaluations done; set by the planner
    pipeline: Any = None  # the resident model; whoever submits holds its lease
    state: Any = None  # latents, conditioning, noise generator; owned by the runner
    preview: Image.Image | None = None  # of the last previewed step; set by the runner
    image: Image.Image | None = None  # set by the runner when decoded
    warnings: tuple[str, ...] = ()  # what the user should know of the prompt; set by the runner
    error: SDBentoError | None = None  # set by the planner

    @property
    def stage(self) -> Stage:
        if self.state is None:
            return Stage.PREPARE
        return Stage.STEP if self.step < self.num_steps else Stage.DECODE

    @property
    def finished(self) -> bool:
        return self.image is not None or self.error is not None

    @property
    def remaining_steps(self) -> int:
        return self.num_steps - self.step


@dataclass(frozen=True)
class StepPlan:
    """What the runner does next: one stage for trajectories that share a key."""

    stage: Stage
    key: BatchKey
    trajectories: tuple[Trajectory, ...]

    @property
    def rows(self) -> int:
        return sum(trajectory.rows for trajectory in self.trajectories)


@dataclass(frozen=True)
class StepResult:
    """What came of a plan: how long it took and whom it failed."""

    seconds: float
    failures: dict[Trajectory, SDBentoError] = field(default_factory=dict)


class Runner(Protocol):
    """The only caller of UNet and VAE. `execute` runs on the engine's thread.

    It either does the whole plan or changes nothing and raises, so that a failed plan can be tried
    again in parts.
    """

    def execute(self, plan: StepPlan) -> StepResult: ...
