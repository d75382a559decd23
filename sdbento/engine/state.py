"""What the runner keeps of a trajectory between two steps, and how it begins.

The generator is drawn from in the order of the stock pipelines: the picture's posterior, the noise,
then the masked picture's posterior, whether or not it is used. Runs on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import interpolate

from sdbento.catalog.families import VAE_FACTOR
from sdbento.engine.trajectory import SizeConditioning, Start, Trajectory
from sdbento.engine.vae import Posterior, draw, encode
from sdbento.images.canvas import enlarge
from sdbento.models.pipeline import Pipeline
from sdbento.prompts.encoder import Conditioning, PreparedPrompt, PromptEncoder

Texts = list[tuple[int, Conditioning]]  # (first step, what the UNet reads from there on)


@dataclass(frozen=True, eq=False)
class Row:
    """What the UNet reads beside the latents, for one row."""

    embeds: torch.Tensor  # [1, 77 * chunks, D]
    pooled: torch.Tensor | None  # [1, P], SDXL
    time_ids: torch.Tensor | None  # [1, 6], SDXL; 5 for its refiner


@dataclass(frozen=True, eq=False)
class Inpainting:
    """What is kept of a picture that is repainted in part."""

    mask: torch.Tensor  # [1, 1, h, w], 1: repaint
    latents: torch.Tensor | None = None  # [1, C, h, w] of the picture, for 4-channel models
    noise: torch.Tensor | None = None  # [1, C, h, w], the first noise
    # [1, 1 + C, h, w], what a 9-channel UNet reads after the latents: mask and masked picture
    extra_channels: torch.Tensor | None = None


@dataclass
class State:
    """A trajectory's own; its owner is `Trajectory.state`."""

    slots: torch.Tensor  # [1 + memory, C, h, w] float32: latents, then the sampler's memory
    generator: torch.Generator  # on the CPU
    texts: Texts
    negative_texts: Texts
    time_ids: torch.Tensor | None  # [1, 6], SDXL
    negative_time_ids: torch.Tensor | None
    inpainting: Inpainting | None = None
    controls: list[torch.Tensor] = field(default_factory=list)  # on the device
    noise: torch.Tensor | None = None  # drawn for the step under way, kept for another try

    def row(self, step: int) -> Row:
        text = _at(self.texts, step)
        return Row(text.embeds, text.pooled, self.time_ids)

    def negative_row(self, step: int) -> Row:
        text = _at(self.negative_texts, step)
        return Row(text.embeds, text.pooled, self.negative_time_ids)


def _at(texts: Texts, step: int) -> Conditioning:
    return next(text for first, text in reversed(texts) if first <= step)


def first_state(trajectory: Trajectory, prompts: PromptEncoder) -> State:
    """Prompts encoded, pictures encoded, noise drawn."""
    pipeline: Pipeline = trajectory.pipeline
    inputs = trajectory.inputs
    guided = len(trajectory.guided_steps) > 0
    texts = _encode(prompts, trajectory, inputs.prompts)
    has_sizes = texts[0][1].pooled is not None
    generator = _generator(trajectory)
    latents, inpainting = _begin(trajectory, generator)
    slots = torch.zeros(inputs.table.num_slots, *latents.shape[1:], device=pipeline.device)
    slots[:1] = latents
    return State(
        slots=slots,
        generator=generator,
        texts=texts,
        negative_texts=_encode(prompts, trajectory, inputs.negative_prompts) if guided else [],
        time_ids=_time_ids(inputs.size, pipeline) if has_sizes else None,
        negative_time_ids=_time_ids(inputs.negative_size, pipeline) if has_sizes else None,
        inpainting=inpainting,
        controls=[
            control.image.to(pipeline.device, control.network.dtype) for control in inputs.controls
        ],
    )


def _encode(
    prompts: PromptEncoder,
    trajectory: Trajectory,
    texts: Sequence[tuple[int, PreparedPrompt]],
) -> Texts:
    key, adapters = trajectory.key, trajectory.inputs.adapters
    return [
        (first, prompts.encode(trajectory.pipeline, text, key.text_chunks, adapters))
        for first, text in texts
    ]


def _generator(trajectory: Trajectory) -> torch.Generator:
    """A successor draws on from where its predecessor stopped."""
    if trajectory.predecessor is not None:
        state: State = trajectory.predecessor.state
        copy = torch.Generator()
        copy.set_state(state.generator.get_state())  # lest a second try draws other noise
        return copy
    return torch.Generator().manual_seed(trajectory.inputs.seed)


def _time_ids(size: SizeConditioning, pipeline: Pipeline) -> torch.Tensor:
    return torch.tensor([size.time_ids], dtype=pipeline.dtype, device=pipeline.device)


def _begin(
    trajectory: Trajectory, generator: torch.Generator
) -> tuple[torch.Tensor, Inpainting | None]:
    """The first latents [1, C, h, w], and what inpainting needs to know of the picture."""
    pipeline: Pipeline = trajectory.pipeline
    table, key, start = trajectory.inputs.table, trajectory.key, trajectory.inputs.start
    shape = (1, pipeline.latent_channels, key.latent_height, key.latent_width)
    if start is None:
        latents = draw(shape, generator, pipeline) * table.init_noise_sigma
        return latents, _all_repainted(shape, generator, pipeline) if pipeline.inpaints else None
    picture = None
    if not (start.pure_noise and pipeline.inpaints):
        picture = _picture_latents(trajectory, start, generator)
    if not start.add_noise:
        assert picture is not None
        return picture, None
    noise = draw(shape, generator, pipeline)
    if start.pure_noise:
        latents = noise * table.init_noise_sigma
    else:
        assert picture is not None
        latents = picture * table.start_signal + noise * table.start_noise
    if start.mask is None:
        whole = _all_repainted(shape, generator, pipeline) if pipeline.inpaints else None
        return latents, whole
    return latents, _inpainting(start, picture, noise, generator, pipeline)


def _picture_latents(
    trajectory: Trajectory, start: Start, generator: torch.Generator
) -> torch.Tensor:
    pipeline: Pipeline = trajectory.pipeline
    if start.pixels is not None:
        return _posterior(start, start.pixels, pipeline).sample(generator, pipeline)
    key, made = trajectory.key, trajectory.predecessor
    assert made is not None
    if made.image is not None:
        assert start.upscaler is not None
        width, height = key.latent_width * VAE_FACTOR, key.latent_height * VAE_FACTOR
        larger = enlarge(made.image, width, height, start.upscaler)
        return encode(larger, pipeline).sample(generator, pipeline)
    latents: torch.Tensor = made.state.slots[:1]
    if start.upscaler is None:
        return latents
    size = (key.latent_height, key.latent_width)
    return interpolate(latents, size=size, mode="bilinear", antialias=True)


# All images of a request start from the same picture: it is encoded once.
_posteriors: WeakKeyDictionary[Start, dict[str, Posterior]] = WeakKeyDictionary()


def _posterior(
    start: Start, pixels: torch.Tensor, pipeline: Pipeline, part: str = "whole"
) -> Posterior:
    known = _posteriors.setdefault(start, {})
    if part not in known:
        known[part] = encode(pixels, pipeline)
    return known[part]


def _inpainting(
    start: Start,
    picture: torch.Tensor | None,
    noise: torch.Tensor,
    generator: torch.Generator,
    pipeline: Pipeline,
) -> Inpainting:
    assert start.mask is not None and start.pixels is not None
    mask = interpolate(start.mask, size=noise.shape[-2:]).to(pipeline.device)
    if pipeline.inpaints:
        known = start.pixels * (start.mask < 0.5)
        masked = _posterior(start, known, pipeline, "masked").sample(generator, pipeline)
        return Inpainting(mask, extra_channels=torch.cat([mask, masked], dim=1))
    draw(noise.shape, generator, pipeline)  # stock encodes the masked picture here as well
    return Inpainting(mask, latents=picture, noise=noise)


def _all_repainted(
    shape: Sequence[int], generator: torch.Generator, pipeline: Pipeline
) -> Inpainting:
    """For an inpainting model without a mask: everything is repainted, nothing is known."""
    batch, _, height, width = shape
    nothing = torch.zeros(batch, 3, height * VAE_FACTOR, width * VAE_FACTOR)
    mask = torch.ones(batch, 1, height, width, device=pipeline.device)
    masked = encode(nothing, pipeline).sample(generator, pipeline)
    return Inpainting(mask, extra_channels=torch.cat([mask, masked], dim=1))
