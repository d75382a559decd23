"""What a pass computes from: read by the runner, opaque to planner and loop. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sdbento.lora.hooks import WeightedAdapter
    from sdbento.models.pipeline import ControlNet
    from sdbento.prompts.tokens import TokenizedPrompt
    from sdbento.samplers.step_table import StepTable


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
class FromNoise:
    """Text to image: the first latents are noise alone."""


@dataclass(frozen=True, eq=False)
class FromImage:
    """Image to image: the first latents are those of an image, noised."""

    pixels: Tensor  # [1, 3, H, W] on [-1, 1]


@dataclass(frozen=True, eq=False)
class Repaint:
    """Inpainting: where the mask is 1 the image is repainted, elsewhere it is kept."""

    pixels: Tensor  # [1, 3, H, W] on [-1, 1]
    mask: Tensor  # [1, 1, H, W], 0 or 1
    pure_noise: bool  # full strength: nothing of the image is in the first latents


@dataclass(frozen=True, eq=False)
class Continue:
    """The refiner: go on with the latents of the pass before, which still carry their noise."""


@dataclass(frozen=True, eq=False)
class Enlarge:
    """A pass at a larger size: what the pass before made, enlarged and noised again."""

    upscaler: str  # how its image is enlarged; "latent": its latents are


Start = FromNoise | FromImage | Repaint | Continue | Enlarge


# (first step, prompt) pairs, the first at step 0: prompt editing changes the prompt on the way.
PromptTimeline = tuple[tuple[int, "TokenizedPrompt"], ...]


@dataclass(frozen=True, eq=False)
class PassInputs:
    """What all images of a request have in common in one pass; only their seeds differ."""

    prompts: PromptTimeline
    negative_prompts: PromptTimeline
    guidance_scale: float
    guidance_rescale: float
    table: StepTable
    size: SizeConditioning
    negative_size: SizeConditioning
    start: Start
    controls: tuple[Control, ...] = ()
    adapters: tuple[WeightedAdapter, ...] = ()


def within(step: int, num_steps: int, start: float, end: float) -> bool:
    """Whether `step` lies between two shares of a run, as diffusers' ControlNet pipelines count."""
    return not (step / num_steps < start or (step + 1) / num_steps > end)
