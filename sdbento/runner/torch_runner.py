"""Plans to tensors: one UNet call and one matrix product advance a batch by a step.

Nothing here waits for the device: what a plan leaves to the host is done when its result is read
(`runner.launched`). Latents, memory and noise stay in float32 whatever the UNet computes in. Knows
nothing of requests or of planning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from traceback import clear_frames

import torch
from PIL import Image

from sdbento.engine.trajectory import BatchKey, Launched, Stage, StepPlan, Trajectory
from sdbento.errors import GenerationFailed, OutOfMemory, SDBentoError, classify
from sdbento.models.device import download, host_tensor, upload
from sdbento.models.pipeline import Pipeline
from sdbento.prompts.encoder import PromptEncoder
from sdbento.prompts.tokens import tokenize
from sdbento.runner.batch import Batch, batch_of, random_batch
from sdbento.runner.graphs import Graphs
from sdbento.runner.launched import Failures, Finish, on_device
from sdbento.runner.numbers import Layout
from sdbento.runner.previews import preview_image, preview_pixels
from sdbento.runner.rows import Row, RowStacker
from sdbento.runner.state import first_state, stack_slots, state_of
from sdbento.runner.step import StepTensors, compute_step
from sdbento.runner.unet.call import call_unet, is_plain
from sdbento.runner.vae import decode, decoder_dtype, to_bytes, upcast_decoder

log = logging.getLogger(__name__)

# 8-bit pixels [H, W, 3] in the host's memory, why there are none, or None: they are not finite.
Decoded = torch.Tensor | SDBentoError | None


class TorchRunner:
    """Executes plans on the device of the pipelines it is handed. `graphs` None: all eagerly.

    `grow` is told how many bytes more a pipeline takes for good, where that is found out late.
    """

    def __init__(
        self,
        prompts: PromptEncoder | None = None,
        graphs: Graphs | None = None,
        grow: Callable[[Pipeline, int], None] = lambda *_: None,
    ) -> None:
        self._prompts = prompts or PromptEncoder()
        self._graphs = graphs
        self._grow = grow
        self._rows = RowStacker()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, pause: Callable[[], None] | None = None) -> Launched:
        work: dict[Stage, Callable[[Sequence[Trajectory]], Finish]] = {
            Stage.PREPARE: self._prepare,
            Stage.STEP: self._step,
            Stage.DECODE: partial(_decode, in_fp32=self._decode_in_fp32),
        }
        device = plan.trajectories[0].pipeline.device
        if not _can_pause(plan):
            pause = None
        try:
            return on_device(device, partial(work[plan.stage], plan.trajectories), pause)
        except torch.OutOfMemoryError:
            if self._graphs is not None:
                self._graphs.forget()
            raise

    @torch.inference_mode()
    def measure(
        self, pipeline: Pipeline, key: BatchKey, rows: int, *, capture: bool = False
    ) -> float:
        """Seconds of a step of `rows` random rows. `capture`: it is captured now, if it can be."""
        batch = random_batch(pipeline, key, self._random_row(pipeline, key), rows)
        shape = rows, 1, pipeline.latent_channels, key.latent_height, key.latent_width
        slots = torch.randn(shape, device=pipeline.device)
        _synchronize(pipeline)
        started = time.perf_counter()
        self._compute(batch, slots, capture=capture)
        _synchronize(pipeline)
        return time.perf_counter() - started

    @torch.inference_mode()
    def measure_decode(self, pipeline: Pipeline, key: BatchKey) -> float:
        """Seconds of decoding one image."""
        shape = 1, pipeline.latent_channels, key.latent_height, key.latent_width
        latents = torch.zeros(shape, device=pipeline.device)
        _synchronize(pipeline)
        started = time.perf_counter()
        to_bytes(decode(latents, pipeline))
        _synchronize(pipeline)
        return time.perf_counter() - started

    def _random_row(self, pipeline: Pipeline, key: BatchKey) -> Row:
        text = self._prompts.encode(pipeline, tokenize(pipeline, ""), key.text_chunks)
        num_time_ids = 5 if pipeline.requires_aesthetics_score else 6
        time_ids = torch.zeros(1, num_time_ids, dtype=pipeline.dtype, device=pipeline.device)
        mask_channels = None
        if pipeline.inpaints:
            shape = 1, 1 + pipeline.latent_channels, key.latent_height, key.latent_width
            mask_channels = torch.randn(shape, device=pipeline.device)
        pooled = text.pooled
        return Row(text.embeds, pooled, None if pooled is None else time_ids, mask_channels)

    def _prepare(self, trajectories: Sequence[Trajectory]) -> Finish:
        states = [first_state(trajectory, self._prompts) for trajectory in trajectories]
        for trajectory, state in zip(trajectories, states, strict=True):
            trajectory.state = state
            trajectory.previous = None
        return dict

    def _step(self, trajectories: Sequence[Trajectory]) -> Finish:
        """States change at the very end, when nothing can fail."""
        batch = batch_of(trajectories)
        states = [state_of(trajectory) for trajectory in trajectories]
        made = self._compute(batch, stack_slots(states, batch.num_slots))
        _add_noise(trajectories, made.slots)
        _put_back_unmasked(trajectories, made.slots)
        finish = _preview(trajectories, made)
        for i, state in enumerate(states):
            state.advance(made.slots, i)
        return finish

    @torch.inference_mode()
    def _decode_in_fp32(self, latents: torch.Tensor, pipeline: Pipeline) -> list[Decoded]:
        """Of latents that decoding in less precision has made NaN of. Halved where that fails."""
        try:
            self._upcast(pipeline)
            pixels = decode(latents, pipeline)
            return list(_decoded(to_bytes(pixels).cpu(), _finite(pixels)))
        except Exception as exc:
            error = classify(exc)
            clear_frames(exc.__traceback__)  # which hold tensors
        if self._graphs is not None and isinstance(error, OutOfMemory):
            self._graphs.forget()
        if len(latents) == 1:
            return [error]
        halves = latents.tensor_split(2)
        return [one for half in halves for one in self._decode_in_fp32(half, pipeline)]

    def _upcast(self, pipeline: Pipeline) -> None:
        if decoder_dtype(pipeline) is not torch.float32:
            self._grow(pipeline, upcast_decoder(pipeline))
            log.warning(
                "%s: the VAE overflows in %s, and decodes in fp32 from now on",
                *(pipeline.spec, pipeline.vae_dtype),
            )

    def _compute(self, batch: Batch, slots: torch.Tensor, *, capture: bool = False) -> StepTensors:
        rows = self._rows.stack(batch.pipeline, batch.rows)
        if self._graphs is not None:
            step = self._graphs.find(batch, rows, at_once=capture)
            if step is not None:
                return step(batch, slots, rows)
        unet = partial(call_unet, batch.pipeline, batch.owners)
        layout = Layout(len(batch.rows), *slots.shape[:2])
        numbers = batch.numbers(layout).to(layout, slots.device)
        return compute_step(unet, slots, rows, numbers, batch.guidance)


def _add_noise(trajectories: Sequence[Trajectory], slots: torch.Tensor) -> None:
    """The fresh noise of stochastic samplers. It is drawn while the device computes the step."""
    drawing = [i for i, t in enumerate(trajectories) if t.inputs.table.draws[t.step]]
    if not drawing:
        return
    device, draws = slots.device, [_draw(trajectories[i]) for i in drawing]
    dtype = reduce(torch.promote_types, [draw.dtype for draw in draws])
    noise = host_tensor((len(drawing), *slots.shape[2:]), dtype, device)
    coefficients = torch.zeros(len(drawing), slots.shape[1])
    for row, i in enumerate(drawing):
        table, step = trajectories[i].inputs.table, trajectories[i].step
        noise[row] = draws[row]
        coefficients[row, : table.num_slots] = table.noise[step]
    added = noise.to(device, non_blocking=True).float()[:, None]
    factors = upload(coefficients, torch.float32, device)[:, :, None, None, None]
    slots.index_add_(0, upload(drawing, torch.int64, device), factors * added)


def _draw(trajectory: Trajectory) -> torch.Tensor:
    """The step's fresh noise [C, h, w]: the last of the draws that the scheduler would make.

    On the host, as diffusers draws with a generator of the CPU. Kept for another try.
    """
    state, table = state_of(trajectory), trajectory.inputs.table
    if state.noise is None:
        shape = (1, *state.slots.shape[1:])
        dtype = torch.float32 if table.draws_in_fp32 else trajectory.pipeline.dtype
        for _ in range(table.draws[trajectory.step]):
            state.noise = torch.randn(shape, generator=state.generator, dtype=dtype)[0]
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


def _preview(trajectories: Sequence[Trajectory], made: StepTensors) -> Finish:
    wanted = [
        i
        for i, trajectory in enumerate(trajectories)
        if trajectory.preview_every and (trajectory.step + 1) % trajectory.preview_every == 0
    ]
    if not wanted:
        return dict
    owners = [trajectories[i] for i in wanted]
    timesteps = [float(owner.inputs.table.timesteps[owner.step]) for owner in owners]
    index = upload(wanted, torch.int64, made.slots.device)
    model_input, output = (part.index_select(0, index) for part in (made.model_input, made.output))
    pixels = download(preview_pixels(owners[0].pipeline, model_input, output, timesteps))

    def finish() -> Failures:
        for owner, image in zip(owners, pixels, strict=True):
            try:
                owner.preview = preview_image(image)
            except Exception:  # no reason to fail the image
                log.exception("a preview cannot be made")
        return {}

    return finish


def _decode(
    trajectories: Sequence[Trajectory],
    in_fp32: Callable[[torch.Tensor, Pipeline], list[Decoded]],
) -> Finish:
    """Latents to images. What fails on the host's side fails for one image alone.

    What overflows is decoded again by `in_fp32`, once the host knows.
    """
    pipeline = trajectories[0].pipeline
    latents = torch.stack([state_of(trajectory).slots[0] for trajectory in trajectories])
    in_half = decoder_dtype(pipeline) is not torch.float32
    pixels = decode(latents, pipeline)
    denoised, finite = download(_finite(latents)), download(_finite(pixels))
    images = download(to_bytes(pixels))

    def finish() -> Failures:
        failures: Failures = {}
        decoded = list(_decoded(images, finite))
        again = [i for i, one in enumerate(decoded) if one is None and denoised[i]]
        if again and in_half:
            for i, image in zip(again, in_fp32(latents[again], pipeline), strict=True):
                decoded[i] = image
        for i, trajectory in enumerate(trajectories):
            try:
                trajectory.image = _image(decoded[i], bool(denoised[i]))
            except Exception as exc:
                failures[trajectory] = classify(exc)
        return failures

    return finish


def _finite(numbers: torch.Tensor) -> torch.Tensor:
    """[B]: for which of [B, ...] all numbers are finite."""
    return numbers.isfinite().flatten(1).all(dim=1)


def _decoded(images: torch.Tensor, finite: torch.Tensor) -> Iterator[Decoded]:
    """Each of images [B, H, W, 3] that is finite, else None."""
    return (image if ok else None for image, ok in zip(images, finite.tolist(), strict=True))


def _image(decoded: Decoded, denoised: bool) -> Image.Image:
    """Raises GenerationFailed where numbers have overflowed for good, and errors as they are."""
    if isinstance(decoded, SDBentoError):
        raise decoded
    if decoded is not None:
        return Image.fromarray(decoded.numpy())
    if not denoised:
        raise GenerationFailed(
            "the image is not finite (NaN): its denoising has overflowed; try a lower "
            "guidance_scale, another scheduler or smaller weights of LoRAs, or, on the server, "
            "PRECISION=bf16 or fp32"
        )
    raise GenerationFailed(
        "the image is not finite (NaN): the model's VAE overflows even in fp32; its files may be "
        "damaged: try another model"
    )


def _can_pause(plan: StepPlan) -> bool:
    """Whether other calls may run in the midst of it: not while the UNet has hooks for its rows,
    nor in compiled code."""
    if plan.stage is not Stage.STEP:
        return True
    return plan.trajectories[0].pipeline.compiled is None and is_plain(plan.trajectories)


def _synchronize(pipeline: Pipeline) -> None:
    """Wait for the device, so that the seconds between are the device's."""
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
