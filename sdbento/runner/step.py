"""One denoising step of a batch as a function of tensors: no trajectories, no waiting.

With x the latents, o the guided model output and s the sampler's memory, a step of every image is
[x', s'] = A [x, o, s] with a small A of its own from its compiled sampler (`samplers.step_table`).
So a batch of different samplers at different steps advances together. Fresh noise is added
afterwards, by whoever draws it.

Everything runs on the device and depends on shapes alone, so that a CUDA graph can replay it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdbento.runner.numbers import Numbers
from sdbento.runner.rows import StackedRows

# The model's output for latents [R, C, h, w] at timesteps [R], in float32.
Unet = Callable[[Tensor, Tensor, StackedRows], Tensor]


@dataclass(frozen=True, eq=False)
class StepTensors:
    """What a step leaves: R rows, B images, S slots."""

    slots: Tensor  # [B, S, C, h, w] float32
    output: Tensor  # [B, C, h, w], the guided model output
    model_input: Tensor  # [R, C, h, w], the latents as the UNet has read them


@dataclass(frozen=True)
class Guidance:
    """Whether any image of a step is guided, and whether any guidance is rescaled."""

    guided: bool = True
    rescaled: bool = True


def compute_step(
    unet: Unet, slots: Tensor, rows: StackedRows, numbers: Numbers, guidance: Guidance
) -> StepTensors:
    """Advance `slots` [B, S, C, h, w] by one step."""
    latents = slots[:, 0].index_select(0, numbers.image_of_row)
    model_input = latents * numbers.input_scale[:, None, None, None]
    raw = unet(model_input, numbers.timesteps, rows)
    output = raw[: len(slots)]
    if guidance.guided:
        output = _guide(output, raw.index_select(0, numbers.negative_row), numbers)
    if guidance.rescaled:
        output = _rescale(output, raw[: len(slots)], numbers.guidance_rescale)
    operands = torch.cat([slots[:, :1], output[:, None], slots[:, 1:]], dim=1)
    advanced = torch.bmm(numbers.matrices, operands.flatten(2)).view_as(slots)
    return StepTensors(advanced, output, model_input)


def _guide(prompted: Tensor, negative: Tensor, numbers: Numbers) -> Tensor:
    """Classifier-free guidance with each image's own scale.

    An image without guidance is its own negative, with scale 1: its output stays as it is.
    """
    return negative + numbers.guidance_scale[:, None, None, None] * (prompted - negative)


def _rescale(output: Tensor, prompted: Tensor, share: Tensor) -> Tensor:
    """Guidance rescale (section 3.4 of "Common Diffusion Noise Schedules and Sample Steps are
    Flawed", Lin et al. 2023), by each image's share [B]."""
    deviation = prompted.std(dim=(1, 2, 3)) / output.std(dim=(1, 2, 3))
    factor = torch.where(share > 0, share * deviation + (1 - share), 1.0)
    return output * factor[:, None, None, None]
