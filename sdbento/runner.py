"""Plans to tensors: the only caller of UNet and VAE. One UNet call and one matmul advance a batch.

With x the latents, o the guided model output and s the sampler's memory, a step of every
trajectory is  [x', s'] = A [x, o, s] + c n  with its own small A and c from its compiled sampler,
so a batch of different samplers at different steps advances together (see `step_table`). Latents,
memory and noise stay in float32 whatever the UNet computes in. Knows nothing of requests or of who
comes next.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sdbento.errors import GenerationFailed, SDBentoError
from sdbento.pipelines import Pipeline
from sdbento.previews import preview_images
from sdbento.prompts import PromptEncoder
from sdbento.trajectory import (
    BatchKey,
    SizeConditioning,
    Stage,
    StepPlan,
    StepResult,
    Trajectory,
)


@dataclass
class State:
    """What the runner keeps of a trajectory between two steps; its owner is `Trajectory.state`.

    Rows of the conditioning tensors: the prompt's, then, where guided, the negative prompt's.
    """

    slots: torch.Tensor  # [1 + memory, C, h, w] float32: latents, then the sampler's memory
    generator: torch.Generator  # on the CPU, in diffusers' order of draws
    embeds: torch.Tensor  # [rows, 77, D]
    pooled: torch.Tensor | None  # [rows, P], SDXL
    time_ids: torch.Tensor | None  # [rows, 6], SDXL
    noise: torch.Tensor | None = (
        None  # drawn for the step under way, kept if it must be tried again
    )


class TorchRunner:
    """Executes plans on the device of the pipelines it is handed."""

    def __init__(self, prompts: PromptEncoder | None = None) -> None:
        self._prompts = prompts or PromptEncoder()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        failures: dict[Trajectory, SDBentoError] = {}
        match plan.stage:
            case Stage.PREPARE:
                self._prepare(plan.trajectories)
            case Stage.STEP:
                _step(plan.trajectories)
            case Stage.DECODE:
                failures = _decode(plan.trajectories)
        return StepResult(time.perf_counter() - started, failures)

    @torch.inference_mode()
    def measure(self, pipeline: Pipeline, key: BatchKey, rows: int) -> float:
        """Seconds of one UNet call on `rows` random rows, for the first cost curve."""
        text = self._prompts.encode(pipeline, "")
        latents = torch.randn(rows, pipeline.latent_channels, key.latent_height, key.latent_width)
        added = None
        if text.pooled is not None:
            added = _added_conditioning(
                text.pooled.expand(rows, -1),
                torch.zeros(rows, 6, device=pipeline.device),
            )
        started = time.perf_counter()
        _unet(
            pipeline,
            latents.to(pipeline.device),
            torch.full((rows,), 500.0, device=pipeline.device),
            text.embeds.expand(rows, -1, -1),
            added,
        )
        _synchronize(pipeline)
        return time.perf_counter() - started

    def _prepare(self, trajectories: Sequence[Trajectory]) -> None:
        states = [self._first_state(trajectory) for trajectory in trajectories]
        for trajectory, state in zip(trajectories, states, strict=True):
            trajectory.state = state

    def _first_state(self, trajectory: Trajectory) -> State:
        pipeline: Pipeline = trajectory.pipeline
        inputs, key = trajectory.inputs, trajectory.key
        texts = [self._prompts.encode(pipeline, inputs.prompt)]
        sizes = [inputs.size]
        if trajectory.rows == 2:
            texts.append(self._prompts.encode(pipeline, inputs.negative_prompt))
            sizes.append(inputs.negative_size)
        trajectory.warnings = tuple(text.warning for text in texts if text.warning)
        generator = torch.Generator().manual_seed(inputs.seed)
        shape = (1, pipeline.latent_channels, key.latent_height, key.latent_width)
        slots = torch.zeros(inputs.table.num_slots, *shape[1:], device=pipeline.device)
        slots[:1] = _draw(shape, generator, pipeline) * inputs.table.init_noise_sigma
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return State(
            slots=slots,
            generator=generator,
            embeds=torch.cat([text.embeds for text in texts]),
            pooled=torch.cat(pooled) if pooled else None,
            time_ids=_time_ids(sizes, pipeline) if pooled else None,
        )


def _time_ids(sizes: Sequence[SizeConditioning], pipeline: Pipeline) -> torch.Tensor:
    ids = [size.time_ids for size in sizes]
    return torch.tensor(ids, dtype=pipeline.dtype, device=pipeline.device)


def _draw(shape: tuple[int, ...], generator: torch.Generator, pipeline: Pipeline) -> torch.Tensor:
    """Noise as diffusers' randn_tensor draws it with a CPU generator: on the CPU, then moved."""
    noise = torch.randn(shape, generator=generator, dtype=pipeline.dtype)
    return noise.to(pipeline.device, torch.float32)


def _step(trajectories: Sequence[Trajectory]) -> None:
    """One UNet call and one matmul; states change at the very end, when nothing can fail."""
    pipeline: Pipeline = trajectories[0].pipeline
    slots = _stack_slots(trajectories)
    output = _guided_output(trajectories, slots[:, 0], pipeline)
    advanced = _advance(trajectories, slots, output)
    _preview(trajectories, slots[:, 0], output, pipeline)
    _synchronize(pipeline)
    for trajectory, new in zip(trajectories, advanced, strict=True):
        state: State = trajectory.state
        state.slots = new[: trajectory.inputs.table.num_slots]
        state.noise = None


def _stack_slots(trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """[B, slots, C, h, w]; samplers with little memory are padded with zeros."""
    num_slots = max(trajectory.inputs.table.num_slots for trajectory in trajectories)
    first: torch.Tensor = trajectories[0].state.slots
    slots = first.new_zeros(len(trajectories), num_slots, *first.shape[1:])
    for row, trajectory in zip(slots, trajectories, strict=True):
        row[: len(trajectory.state.slots)] = trajectory.state.slots
    return slots


def _guided_output(
    trajectories: Sequence[Trajectory], latents: torch.Tensor, pipeline: Pipeline
) -> torch.Tensor:
    """The model's output for each trajectory after classifier-free guidance, [B, C, h, w] float32.

    UNet rows: every trajectory's prompt first, then the negative prompt of the guided ones.
    """
    states: list[State] = [trajectory.state for trajectory in trajectories]
    guided = [i for i, trajectory in enumerate(trajectories) if trajectory.rows == 2]
    owners = [*range(len(trajectories)), *guided]
    tables = [(trajectory.inputs.table, trajectory.step) for trajectory in trajectories]
    scale = torch.stack([table.input_scale[step] for table, step in tables])
    timesteps = torch.stack([table.timesteps[step] for table, step in tables])
    model_input = latents * scale.to(latents.device)[:, None, None, None]
    added = None
    if states[0].pooled is not None:
        added = _added_conditioning(
            _rows([state.pooled for state in states], guided),
            _rows([state.time_ids for state in states], guided),
        )
    output = _unet(
        pipeline,
        model_input[owners],
        timesteps[owners].to(latents.device),
        _rows([state.embeds for state in states], guided),
        added,
    )
    prompted = output[: len(trajectories)]
    if guided:
        prompted[guided] = _guide(
            prompted[guided],
            output[len(trajectories) :],
            [trajectories[i] for i in guided],
        )
    return prompted


def _rows(conditioning: Sequence[torch.Tensor | None], guided: Sequence[int]) -> torch.Tensor:
    """Conditioning in the order of the UNet's rows."""
    given = [tensor for tensor in conditioning if tensor is not None]
    return torch.cat([tensor[:1] for tensor in given] + [given[i][1:] for i in guided])


def _added_conditioning(pooled: torch.Tensor, time_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"text_embeds": pooled, "time_ids": time_ids}


def _unet(
    pipeline: Pipeline,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    embeds: torch.Tensor,
    added: dict[str, torch.Tensor] | None,
) -> torch.Tensor:
    output: torch.Tensor = pipeline.unet(
        latents.to(pipeline.dtype),
        timesteps,
        embeds,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return output.float()


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
    state: State = trajectory.state
    if state.noise is None:
        shape = (1, *state.slots.shape[1:])
        for _ in range(trajectory.inputs.table.draws[trajectory.step]):
            state.noise = _draw(shape, state.generator, trajectory.pipeline)[0]
    assert state.noise is not None
    return state.noise


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
    tables = [(trajectories[i].inputs.table, trajectories[i].step) for i in wanted]
    scale = torch.stack([table.input_scale[step] for table, step in tables]).to(latents.device)
    images = preview_images(
        pipeline,
        latents[wanted] * scale[:, None, None, None],
        output[wanted],
        [float(table.timesteps[step]) for table, step in tables],
    )
    for i, image in zip(wanted, images, strict=True):
        trajectories[i].preview = image


def _decode(trajectories: Sequence[Trajectory]) -> dict[Trajectory, SDBentoError]:
    """Latents to pictures; returns those trajectories whose picture is not finite."""
    failures: dict[Trajectory, SDBentoError] = {}
    for trajectory, pixels in zip(trajectories, decode_pixels(trajectories), strict=True):
        if np.isfinite(pixels).all():
            trajectory.image = Image.fromarray((pixels * 255).round().astype("uint8"))
        else:
            failures[trajectory] = GenerationFailed(
                "the picture is not finite (NaN); try PRECISION=fp32 or other parameters"
            )
    return failures


@torch.inference_mode()
def decode_pixels(trajectories: Sequence[Trajectory]) -> NDArray[np.float32]:
    """Finished latents through the VAE, as the stock pipelines do it: [B, H, W, 3] on [0, 1]."""
    pipeline: Pipeline = trajectories[0].pipeline
    latents = torch.stack([trajectory.state.slots[0] for trajectory in trajectories])
    scaled = _unscale(latents, pipeline).to(pipeline.vae_dtype)
    decoded = pipeline.vae.decode(scaled, return_dict=False)[0].float()
    pixels: NDArray[np.float32] = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def _unscale(latents: torch.Tensor, pipeline: Pipeline) -> torch.Tensor:
    """Undo the scaling under which the UNet was trained."""
    config = pipeline.vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        latents = latents * latents.new_tensor(std).view(shape)
        return latents / float(config.scaling_factor) + latents.new_tensor(mean).view(shape)
    return latents / float(config.scaling_factor)


def _synchronize(pipeline: Pipeline) -> None:
    """Wait for the device, so that measured seconds are its seconds and errors surface here."""
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
