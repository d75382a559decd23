"""What the runner keeps of a trajectory between two steps, and how a pass begins.

The generator is drawn from in the order of the stock pipelines: the image's posterior, the noise,
then the masked image's posterior, whether or not it is used. Runs on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import interpolate

from sdbento.catalog.families import VAE_FACTOR
from sdbento.engine.inputs import (
    Continue,
    Enlarge,
    FromImage,
    FromNoise,
    PromptTimeline,
    Repaint,
    SizeConditioning,
)
from sdbento.engine.trajectory import PassOutcome, Trajectory
from sdbento.images.canvas import enlarge
from sdbento.models.device import upload
from sdbento.models.pipeline import Pipeline
from sdbento.prompts.encoder import Conditioning, PromptEncoder
from sdbento.runner.launched import without_pauses
from sdbento.runner.rows import Row
from sdbento.runner.vae import Posterior, draw_noise, encode

RowTimeline = list[tuple[int, Row]]  # as a PromptTimeline, encoded


@dataclass(frozen=True, eq=False)
class Original:
    """The image that a 4-channel model repaints in part: it is put back outside of the mask."""

    mask: torch.Tensor  # [1, 1, h, w], 1: repaint
    latents: torch.Tensor  # [1, C, h, w] of the image
    noise: torch.Tensor  # [1, C, h, w], the first noise


@dataclass
class State:
    """A trajectory's own; its owner is `Trajectory.state`."""

    slots: torch.Tensor  # [1 + memory, C, h, w] float32: latents, then the sampler's memory
    generator: torch.Generator  # on the CPU
    prompts: RowTimeline
    negative_prompts: RowTimeline
    original: Original | None = None
    controls: list[torch.Tensor] = field(default_factory=list)  # on the device
    # [rows, C, h, w]: what the last whole step kept for shallow ones; the negative row is last
    features: torch.Tensor | None = None
    noise: torch.Tensor | None = None  # [C, h, w], drawn for the step under way; on the host
    batch: torch.Tensor | None = None  # the slots of all images of the last step, and
    batch_index: int = 0  # this one's place in it

    def row(self, step: int) -> Row:
        return _at(self.prompts, step)

    def negative_row(self, step: int) -> Row:
        return _at(self.negative_prompts, step)

    def advance(self, batch: torch.Tensor, index: int) -> None:
        """Take over the slots that a step has made, [B, S, C, h, w]."""
        self.slots, self.batch, self.batch_index = batch[index], batch, index
        self.noise = None


def state_of(trajectory: Trajectory) -> State:
    """The state of a trajectory that has begun; planner and loop make sure that it has."""
    assert trajectory.state is not None
    return trajectory.state


def _at(prompts: RowTimeline, step: int) -> Row:
    return next(row for first, row in reversed(prompts) if first <= step)


def stack_slots(states: Sequence[State], num_slots: int) -> torch.Tensor:
    """[B, S, C, h, w] with at least `num_slots` slots; what samplers do not use is zero.

    Where the images are those of the last step, in their order, what it has made is used as it is.
    """
    last = states[0].batch
    together = all(state.batch is last and state.batch_index == i for i, state in enumerate(states))
    if last is not None and together and len(last) == len(states) and last.shape[1] >= num_slots:
        return last
    first = states[0].slots
    slots = first.new_zeros(len(states), num_slots, *first.shape[1:])
    for row, state in zip(slots, states, strict=True):
        used = min(num_slots, len(state.slots))
        row[:used] = state.slots[:used]
    return slots


def first_state(trajectory: Trajectory, encoder: PromptEncoder) -> State:
    """Prompts encoded, images encoded, noise drawn."""
    pipeline, inputs = trajectory.pipeline, trajectory.inputs
    guided = len(trajectory.current.guided_steps) > 0
    with without_pauses():  # meanwhile text encoders have hooks for this image's prompts
        prompts = _encode(encoder, trajectory, inputs.prompts)
        negative_prompts = _encode(encoder, trajectory, inputs.negative_prompts) if guided else []
    generator = _generator(trajectory)
    beginning = _begin(trajectory, generator)
    slots = torch.zeros(
        inputs.table.num_slots, *beginning.latents.shape[1:], device=pipeline.device
    )
    slots[:1] = beginning.latents
    return State(
        slots=slots,
        generator=generator,
        prompts=_rows(prompts, inputs.size, beginning, pipeline),
        negative_prompts=_rows(negative_prompts, inputs.negative_size, beginning, pipeline),
        original=beginning.original,
        controls=[
            upload(control.image, control.network.dtype, pipeline.device)
            for control in inputs.controls
        ],
    )


def _encode(
    encoder: PromptEncoder,
    trajectory: Trajectory,
    prompts: PromptTimeline,
) -> list[tuple[int, Conditioning]]:
    key, adapters = trajectory.key, trajectory.inputs.adapters
    return [
        (first, encoder.encode(trajectory.pipeline, prompt, key.text_chunks, adapters))
        for first, prompt in prompts
    ]


def _rows(
    prompts: Sequence[tuple[int, Conditioning]],
    size: SizeConditioning,
    beginning: _Beginning,
    pipeline: Pipeline,
) -> RowTimeline:
    """What the UNet reads at each prompt."""
    time_ids = upload([size.time_ids], pipeline.dtype, pipeline.device)
    return [
        (
            first,
            Row(
                text.embeds,
                text.pooled,
                None if text.pooled is None else time_ids,
                beginning.mask_channels,
            ),
        )
        for first, text in prompts
    ]


def _generator(trajectory: Trajectory) -> torch.Generator:
    """A later pass draws on from where the one before has stopped."""
    if trajectory.previous is None:
        return torch.Generator().manual_seed(trajectory.seed)
    copy = torch.Generator()  # lest a second try draws other noise
    copy.set_state(trajectory.previous.state.generator.get_state())
    return copy


@dataclass(frozen=True, eq=False)
class _Beginning:
    """The first latents [1, C, h, w], and what inpainting needs to know of the image."""

    latents: torch.Tensor
    original: Original | None = None
    mask_channels: torch.Tensor | None = None


def _begin(trajectory: Trajectory, generator: torch.Generator) -> _Beginning:
    pipeline, table = trajectory.pipeline, trajectory.inputs.table
    match trajectory.inputs.start:
        case Continue():
            return _Beginning(_outcome(trajectory).state.slots[:1])
        case Repaint() as repaint:
            return _begin_repainting(repaint, trajectory, generator)
        case FromNoise():
            latents = draw_noise(_shape(trajectory), generator, pipeline) * table.init_noise_sigma
        case FromImage() as start:
            clean = _posterior(start, start.pixels, pipeline).sample(generator, pipeline)
            latents = _noised(clean, trajectory, generator)
        case Enlarge(upscaler=upscaler):
            latents = _noised(_enlarged(trajectory, upscaler, generator), trajectory, generator)
    channels = _all_repainted(latents.shape, generator, pipeline) if pipeline.inpaints else None
    return _Beginning(latents, mask_channels=channels)


def _shape(trajectory: Trajectory) -> tuple[int, int, int, int]:
    key = trajectory.key
    return 1, trajectory.pipeline.latent_channels, key.latent_height, key.latent_width


def _noised(
    clean: torch.Tensor, trajectory: Trajectory, generator: torch.Generator
) -> torch.Tensor:
    """Latents of an image with the noise that the first step expects."""
    table = trajectory.inputs.table
    noise = draw_noise(_shape(trajectory), generator, trajectory.pipeline)
    return clean * table.start_signal + noise * table.start_noise


def _outcome(trajectory: Trajectory) -> PassOutcome:
    """Of the pass before; a first pass never starts from one."""
    assert trajectory.previous is not None
    return trajectory.previous


def _enlarged(trajectory: Trajectory, upscaler: str, generator: torch.Generator) -> torch.Tensor:
    """Latents, at this pass's size, of what the pass before has made."""
    key, pipeline, previous = trajectory.key, trajectory.pipeline, _outcome(trajectory)
    if previous.image is None:
        size = (key.latent_height, key.latent_width)
        latents = previous.state.slots[:1]
        return interpolate(latents, size=size, mode="bilinear", antialias=True)
    width, height = key.latent_width * VAE_FACTOR, key.latent_height * VAE_FACTOR
    larger = enlarge(previous.image, width, height, upscaler)
    return encode(larger, pipeline).sample(generator, pipeline)


# All images of a request start from the same image: it is encoded once.
_posteriors: WeakKeyDictionary[FromImage | Repaint, dict[str, Posterior]] = WeakKeyDictionary()


def _posterior(
    start: FromImage | Repaint, pixels: torch.Tensor, pipeline: Pipeline, part: str = "whole"
) -> Posterior:
    known = _posteriors.setdefault(start, {})
    if part not in known:
        known[part] = encode(pixels, pipeline)
    return known[part]


def _begin_repainting(
    repaint: Repaint, trajectory: Trajectory, generator: torch.Generator
) -> _Beginning:
    pipeline, table = trajectory.pipeline, trajectory.inputs.table
    clean = None  # a 9-channel model at full strength never reads the image's own latents
    if not (repaint.pure_noise and pipeline.inpaints):
        clean = _posterior(repaint, repaint.pixels, pipeline).sample(generator, pipeline)
    noise = draw_noise(_shape(trajectory), generator, pipeline)
    if clean is None or repaint.pure_noise:
        latents = noise * table.init_noise_sigma
    else:
        latents = clean * table.start_signal + noise * table.start_noise
    mask = interpolate(repaint.mask, size=noise.shape[-2:])
    mask = upload(mask, mask.dtype, pipeline.device)
    if clean is None or pipeline.inpaints:
        known = repaint.pixels * (repaint.mask < 0.5)
        masked = _posterior(repaint, known, pipeline, "masked").sample(generator, pipeline)
        return _Beginning(latents, mask_channels=torch.cat([mask, masked], dim=1))
    draw_noise(noise.shape, generator, pipeline)  # stock encodes the masked image here as well
    return _Beginning(latents, Original(mask, clean, noise))


def _all_repainted(
    shape: Sequence[int], generator: torch.Generator, pipeline: Pipeline
) -> torch.Tensor:
    """For an inpainting model without a mask: everything is repainted, nothing is known."""
    batch, _, height, width = shape
    nothing = torch.zeros(batch, 3, height * VAE_FACTOR, width * VAE_FACTOR)
    mask = torch.ones(batch, 1, height, width, device=pipeline.device)
    masked = encode(nothing, pipeline).sample(generator, pipeline)
    return torch.cat([mask, masked], dim=1)
