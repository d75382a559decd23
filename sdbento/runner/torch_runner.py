"""Plans to tensors. One UNet call and one matmul advance a batch by a step.

With x the latents, o the guided model output and s the sampler's memory, a step of every
trajectory is  [x', s'] = A [x, o, s] + c n  with a small A and c of its own from its compiled
sampler (see `samplers.step_table`). So a batch of different samplers at different steps advances
together. Latents, memory and noise stay in float32 whatever the UNet computes in. Knows nothing of
requests or of planning.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sdbento.engine.trajectory import BatchKey, Launched, Stage, StepPlan, StepResult, Trajectory
from sdbento.errors import GenerationFailed, SDBentoError
from sdbento.lora.hooks import active_adapters
from sdbento.models.pipeline import Pipeline
from sdbento.prompts.encoder import PromptEncoder
from sdbento.prompts.tokens import tokenize
from sdbento.runner.controlnets import added_conditioning, compute_residuals
from sdbento.runner.previews import preview_images
from sdbento.runner.state import Row, first_state, state_of
from sdbento.runner.vae import decode, draw_noise


@dataclass(frozen=True)
class Computed:
    """A plan that was computed when it was launched."""

    result: StepResult
    done: bool = True

    def wait(self) -> StepResult:
        return self.result


class TorchRunner:
    """Executes plans on the device of the pipelines it is handed."""

    def __init__(self, prompts: PromptEncoder | None = None) -> None:
        self._prompts = prompts or PromptEncoder()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        started = time.perf_counter()
        failures: dict[Trajectory, SDBentoError] = {}
        match plan.stage:
            case Stage.PREPARE:
                self._prepare(plan.trajectories)
            case Stage.STEP:
                _step(plan.trajectories)
            case Stage.DECODE:
                failures = _decode(plan.trajectories)
        return Computed(StepResult(time.perf_counter() - started, failures))

    @torch.inference_mode()
    def measure(self, pipeline: Pipeline, key: BatchKey, rows: int) -> float:
        """Seconds of one UNet call on `rows` random rows."""
        text = self._prompts.encode(pipeline, tokenize(pipeline, ""), key.text_chunks)
        channels = int(pipeline.unet.config.in_channels)
        latents = torch.randn(rows, channels, key.latent_height, key.latent_width)
        num_time_ids = 5 if pipeline.requires_aesthetics_score else 6
        time_ids = torch.zeros(1, num_time_ids, dtype=pipeline.dtype, device=pipeline.device)
        row = Row(text.embeds, text.pooled, None if text.pooled is None else time_ids)
        timesteps = torch.full((rows,), 500.0, device=pipeline.device)
        started = time.perf_counter()
        _unet(pipeline, latents.to(pipeline.device), timesteps, [row] * rows)
        _synchronize(pipeline)
        return time.perf_counter() - started

    @torch.inference_mode()
    def measure_decode(self, pipeline: Pipeline, key: BatchKey) -> float:
        """Seconds of decoding one image."""
        shape = 1, pipeline.latent_channels, key.latent_height, key.latent_width
        started = time.perf_counter()
        decode(torch.zeros(shape, device=pipeline.device), pipeline)
        return time.perf_counter() - started

    def _prepare(self, trajectories: Sequence[Trajectory]) -> None:
        states = [first_state(trajectory, self._prompts) for trajectory in trajectories]
        for trajectory, state in zip(trajectories, states, strict=True):
            trajectory.state = state
            trajectory.previous = None


def _step(trajectories: Sequence[Trajectory]) -> None:
    """One UNet call and one matmul. States change at the very end, when nothing can fail."""
    pipeline = trajectories[0].pipeline
    slots = _stack_slots(trajectories)
    output = _guided_output(trajectories, slots[:, 0], pipeline)
    advanced = _advance(trajectories, slots, output)
    _put_back_unmasked(trajectories, advanced)
    _preview(trajectories, slots[:, 0], output, pipeline)
    _synchronize(pipeline)
    for trajectory, new in zip(trajectories, advanced, strict=True):
        state = state_of(trajectory)
        state.slots = new[: trajectory.inputs.table.num_slots]
        state.noise = None


def _stack_slots(trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """[B, slots, C, h, w]; samplers with little memory are padded with zeros."""
    num_slots = max(trajectory.inputs.table.num_slots for trajectory in trajectories)
    first = state_of(trajectories[0]).slots
    slots = first.new_zeros(len(trajectories), num_slots, *first.shape[1:])
    for row, trajectory in zip(slots, trajectories, strict=True):
        row[: len(state_of(trajectory).slots)] = state_of(trajectory).slots
    return slots


def _guided_output(
    trajectories: Sequence[Trajectory], latents: torch.Tensor, pipeline: Pipeline
) -> torch.Tensor:
    """The model's output for each trajectory after classifier-free guidance, [B, C, h, w] float32.

    UNet rows: every trajectory's prompt first, then the negative prompt of the guided ones.
    """
    guided = [i for i, trajectory in enumerate(trajectories) if trajectory.rows == 2]
    owners = [*trajectories, *(trajectories[i] for i in guided)]
    rows = [state_of(trajectory).row(trajectory.step) for trajectory in trajectories]
    rows += [state_of(trajectories[i]).negative_row(trajectories[i].step) for i in guided]
    timesteps = torch.stack([owner.inputs.table.timesteps[owner.step] for owner in owners])
    scaled = _scale(torch.cat([latents, latents[guided]]), owners)
    output = _unet(pipeline, scaled, timesteps.to(latents.device), rows, owners)
    prompted = output[: len(trajectories)]
    if guided:
        prompted[guided] = _guide(
            prompted[guided],
            output[len(trajectories) :],
            [trajectories[i] for i in guided],
        )
    return prompted


def _scale(latents: torch.Tensor, owners: Sequence[Trajectory]) -> torch.Tensor:
    """Latents [R, C, h, w] as the UNet reads them at their owners' noise levels."""
    scale = torch.stack([owner.inputs.table.input_scale[owner.step] for owner in owners])
    return latents * scale.to(latents.device)[:, None, None, None]


def _unet(
    pipeline: Pipeline,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    rows: Sequence[Row],
    owners: Sequence[Trajectory] = (),
) -> torch.Tensor:
    """One call for all rows. `owners` are the trajectories that the rows belong to, with their
    adapters, ControlNets and masks; empty for random rows."""
    residuals = compute_residuals(owners, rows, latents, timesteps)
    model_input = _with_mask_channels(latents, owners) if pipeline.inpaints else latents
    adapters = [owner.inputs.adapters for owner in owners]
    # A compiled UNet would skip the hooks of the adapters.
    unet = pipeline.unet.forward if any(adapters) else pipeline.unet
    with active_adapters(pipeline.unet, "unet", adapters):
        output: torch.Tensor = unet(
            model_input.to(pipeline.dtype),
            timesteps,
            torch.cat([row.embeds for row in rows]),
            added_cond_kwargs=added_conditioning(rows),
            down_block_additional_residuals=residuals and residuals.down,
            mid_block_additional_residual=residuals and residuals.middle,
            return_dict=False,
        )[0]
    return output.float()


def _with_mask_channels(latents: torch.Tensor, owners: Sequence[Trajectory]) -> torch.Tensor:
    """What a 9-channel UNet reads: latents, mask, latents of the masked image."""
    if not owners:
        return latents
    channels = [state_of(owner).mask_channels for owner in owners]
    return torch.cat([latents, torch.cat([c for c in channels if c is not None])], dim=1)


def _guide(
    prompted: torch.Tensor, negative: torch.Tensor, trajectories: Sequence[Trajectory]
) -> torch.Tensor:
    """Classifier-free guidance with each row's own scale, then guidance rescale (section 3.4 of
    "Common Diffusion Noise Schedules and Sample Steps are Flawed", Lin et al. 2023)."""
    scale = prompted.new_tensor([t.inputs.guidance_scale for t in trajectories])
    output = negative + scale[:, None, None, None] * (prompted - negative)
    rescaled = [i for i, t in enumerate(trajectories) if t.inputs.guidance_rescale > 0]
    if rescaled:
        share = prompted.new_tensor([trajectories[i].inputs.guidance_rescale for i in rescaled])
        deviation = prompted[rescaled].std(dim=(1, 2, 3)) / output[rescaled].std(dim=(1, 2, 3))
        output[rescaled] *= (share * deviation + (1 - share))[:, None, None, None]
    return output


def _advance(
    trajectories: Sequence[Trajectory], slots: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """All samplers at once: [x', s'] = A [x, o, s] + c n; new slots [B, slots, C, h, w]."""
    batch, num_slots = slots.shape[:2]
    matrices = torch.zeros(batch, num_slots, num_slots + 1)
    coefficients = torch.zeros(batch, num_slots)
    noise = torch.zeros_like(output)
    for i, trajectory in enumerate(trajectories):
        table, step = trajectory.inputs.table, trajectory.step
        matrices[i, : table.num_slots, : table.num_slots + 1] = table.matrices[step]
        if table.draws[step]:
            noise[i] = _noise(trajectory)
            coefficients[i, : table.num_slots] = table.noise[step]
    operands = torch.cat([slots[:, :1], output[:, None], slots[:, 1:]], dim=1)
    advanced = torch.bmm(matrices.to(slots.device), operands.flatten(2)).view_as(slots)
    if coefficients.any():
        advanced += coefficients.to(slots.device)[:, :, None, None, None] * noise[:, None]
    return advanced


def _noise(trajectory: Trajectory) -> torch.Tensor:
    """The step's fresh noise [C, h, w]: the last of the draws that the scheduler would make."""
    state = state_of(trajectory)
    if state.noise is None:
        shape = (1, *state.slots.shape[1:])
        for _ in range(trajectory.inputs.table.draws[trajectory.step]):
            state.noise = draw_noise(shape, state.generator, trajectory.pipeline)[0]
    assert state.noise is not None
    return state.noise


def _put_back_unmasked(trajectories: Sequence[Trajectory], slots: torch.Tensor) -> None:
    """Inpainting with a 4-channel model: outside the mask the latents are the image's, as noisy."""
    for trajectory, advanced in zip(trajectories, slots, strict=True):
        original = state_of(trajectory).original
        if original is None:
            continue
        table, step, mask = trajectory.inputs.table, trajectory.step, original.mask[0]
        signal, noise = table.kept_signal[step], table.kept_noise[step]
        noised = original.latents * signal + original.noise * noise
        advanced[:1] = (1 - mask) * noised[0] + mask * advanced[0]


def _preview(
    trajectories: Sequence[Trajectory],
    latents: torch.Tensor,
    output: torch.Tensor,
    pipeline: Pipeline,
) -> None:
    wanted = [
        i
        for i, trajectory in enumerate(trajectories)
        if trajectory.preview_every and (trajectory.step + 1) % trajectory.preview_every == 0
    ]
    if not wanted:
        return
    owners = [trajectories[i] for i in wanted]
    timesteps = [float(owner.inputs.table.timesteps[owner.step]) for owner in owners]
    images = preview_images(pipeline, _scale(latents[wanted], owners), output[wanted], timesteps)
    for owner, image in zip(owners, images, strict=True):
        owner.preview = image


def _decode(trajectories: Sequence[Trajectory]) -> dict[Trajectory, SDBentoError]:
    """Latents to images; returns the trajectories whose image is not finite."""
    failures: dict[Trajectory, SDBentoError] = {}
    for trajectory, pixels in zip(trajectories, decode_pixels(trajectories), strict=True):
        if np.isfinite(pixels).all():
            trajectory.image = Image.fromarray((pixels * 255).round().astype("uint8"))
        else:
            failures[trajectory] = GenerationFailed(
                "the image is not finite (NaN); try PRECISION=fp32 or other parameters"
            )
    return failures


@torch.inference_mode()
def decode_pixels(trajectories: Sequence[Trajectory]) -> NDArray[np.float32]:
    """Finished latents through the VAE: [B, H, W, 3] on [0, 1]."""
    latents = torch.stack([state_of(trajectory).slots[0] for trajectory in trajectories])
    return decode(latents, trajectories[0].pipeline)


def _synchronize(pipeline: Pipeline) -> None:
    """Wait for the device, so that the seconds are the device's and its errors are raised here."""
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
