"""The passes of a request: what all its images have in common.

One pass, or two where a refiner takes over or a second follows at a larger size. Sizes, steps and
draws are those of the stock pipelines. Knows nothing of names: LoRAs and models are resident.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from sdbento.catalog.families import VAE_FACTOR
from sdbento.engine.inputs import (
    Continue,
    Control,
    Enlarge,
    FromImage,
    FromNoise,
    PassInputs,
    PromptTimeline,
    Repaint,
    SizeConditioning,
    Start,
    within,
)
from sdbento.engine.trajectory import BatchKey, Pass
from sdbento.images.canvas import inpaint_control, prepare_control
from sdbento.lora.hooks import WeightedAdapter
from sdbento.models.pipeline import Pipeline
from sdbento.prompts.inversions import Inversions
from sdbento.prompts.syntax import schedule
from sdbento.prompts.tokens import TokenizedPrompt, tokenize
from sdbento.request.resolved import ResidentModels, ResolvedRequest
from sdbento.request.schema import Hires, Refiner, floor_side
from sdbento.request.settle import SettledRequest
from sdbento.samplers import stock
from sdbento.samplers.compile import compile_table
from sdbento.samplers.scheduler import SamplerSpec
from sdbento.samplers.step_table import WHOLE, StepTable, Window


@dataclass(frozen=True, eq=False)
class PassBuilder:
    """Makes the passes of one request."""

    request: ResolvedRequest
    models: ResidentModels
    adapters: tuple[WeightedAdapter, ...]
    inversions: Inversions

    @property
    def settled(self) -> SettledRequest:
        return self.request.settled

    def passes(self) -> tuple[Pass, ...]:
        if self.settled.refiner is not None:
            return self._with_refiner(self.settled.refiner)
        first = self._first_pass(self._window())
        if self.settled.hires is not None:
            return self._with_second_size(first, self.settled.hires)
        return (first,)

    def _window(self) -> Window:
        steps, strength = self.settled.num_inference_steps, self.settled.strength
        return WHOLE if strength is None else Window(_steps_left_out(steps, strength))

    def _start(self) -> Start:
        canvas = self.request.canvas
        if canvas is None:
            return FromNoise()
        if canvas.mask is None:
            return FromImage(canvas.pixels)
        return Repaint(canvas.pixels, canvas.mask, pure_noise=self.settled.strength == 1.0)

    def _first_pass(self, window: Window, steps_after: int = 0) -> Pass:
        settled, pipeline, start = self.settled, self.models.pipeline, self._start()
        table = compile_sampler(settled, pipeline, start, window)
        guided = self._guided_steps(table.num_steps, after=steps_after)
        return self._pass(pipeline, table, start, settled.width, settled.height, guided)

    def _with_refiner(self, refiner: Refiner) -> tuple[Pass, ...]:
        """Base and refiner as an "ensemble of expert denoisers": the second goes on with the
        latents, noise and all, at the noise level where the first has stopped."""
        settled, pipeline, start = self.settled, self.models.refiner, Continue()
        assert pipeline is not None  # a request with a refiner leases one
        table = compile_sampler(settled, pipeline, start, Window(denoising_start=refiner.switch_at))
        window = replace(self._window(), denoising_end=refiner.switch_at)
        first = self._first_pass(window, steps_after=table.num_steps)
        guided = self._guided_steps(table.num_steps, before=first.num_steps)
        second = self._pass(pipeline, table, start, settled.width, settled.height, guided)
        return replace(first, decodes=False), second

    def _with_second_size(self, first: Pass, hires: Hires) -> tuple[Pass, ...]:
        """Image to image at a larger size, from what the first pass has made."""
        settled = self.settled
        width, height = (floor_side(hires.scale * side) for side in (settled.width, settled.height))
        steps = hires.steps or settled.num_inference_steps
        start, window = Enlarge(hires.upscaler), Window(_steps_left_out(steps, hires.strength))
        table = compile_sampler(settled, first.pipeline, start, window, steps)
        guided = self._guided_steps(table.num_steps)
        second = self._pass(first.pipeline, table, start, width, height, guided)
        return replace(first, decodes=hires.upscaler != "latent"), second

    def _pass(
        self,
        pipeline: Pipeline,
        table: StepTable,
        start: Start,
        width: int,
        height: int,
        guided_steps: range,
    ) -> Pass:
        refines = isinstance(start, Continue)
        prompts, negative_prompts = self._prompts(pipeline, table.num_steps)
        size, negative_size = self._sizes(pipeline, start, width, height)
        inputs = PassInputs(
            prompts=prompts,
            negative_prompts=negative_prompts,
            guidance_scale=self.settled.guidance_scale,
            guidance_rescale=self.settled.guidance_rescale,
            table=table,
            size=size,
            negative_size=negative_size,
            start=start,
            controls=() if refines else self._controls(width, height),
            adapters=() if refines else self.adapters,
        )
        num_chunks = max(prompt.num_chunks for _, prompt in (*prompts, *negative_prompts))
        key = BatchKey(
            pipeline.spec.name,
            height // VAE_FACTOR,
            width // VAE_FACTOR,
            text_chunks=num_chunks,
            token_merging_ratio=self.settled.token_merging_ratio,
        )
        return Pass(
            key,
            table.num_steps,
            guided_steps,
            inputs,
            pipeline,
            deep_cache_interval=self.settled.deep_cache_interval,
            encodes=_encodes(start),
        )

    def _prompts(self, pipeline: Pipeline, num_steps: int) -> tuple[PromptTimeline, PromptTimeline]:
        """The prompts, and the negative ones."""
        request, settled = self.request, self.settled
        negative = settled.negative_prompt
        if negative is None and settled.negative_prompt_2 is not None:
            negative = ""
        return (
            self._timeline(
                pipeline, request.prompt, request.prompt_2, num_steps, settled.clip_skip
            ),
            self._timeline(pipeline, negative, settled.negative_prompt_2, num_steps),
        )

    def _timeline(
        self,
        pipeline: Pipeline,
        text: str | None,
        text_2: str | None,
        num_steps: int,
        clip_skip: int | None = None,  # the stock pipelines skip nothing in the negative prompt
    ) -> PromptTimeline:
        """More than one where the text is edited on the way."""
        options: dict[str, Any] = {"clip_skip": clip_skip, "inversions": self.inversions}
        if text is None:
            return ((0, tokenize(pipeline, None, **options)),)
        one = dict(schedule(text, num_steps))
        two = dict(schedule(text_2, num_steps)) if text_2 is not None else {}
        prompts: list[tuple[int, TokenizedPrompt]] = []
        for step in sorted({*one, *two}):
            text, text_2 = one.get(step, text), two.get(step, text_2)
            prompts.append((step, tokenize(pipeline, text, text_2=text_2, **options)))
        return tuple(prompts)

    def _sizes(
        self, pipeline: Pipeline, start: Start, width: int, height: int
    ) -> tuple[SizeConditioning, SizeConditioning]:
        """SDXL's size conditioning of the prompt's rows and of the negative prompt's."""
        settled = self.settled
        size = _size_conditioning(settled, height, width)
        is_image_task = not isinstance(start, FromNoise)
        negative_size = _negative_size_conditioning(settled, size, is_image_task=is_image_task)
        if not pipeline.requires_aesthetics_score:
            return size, negative_size
        scores = settled.refiner or Refiner()
        return (
            replace(size, aesthetic_score=scores.aesthetic_score),
            replace(
                negative_size,
                crops_coords_top_left=settled.negative_crops_coords_top_left,
                aesthetic_score=scores.negative_aesthetic_score,
            ),
        )

    def _controls(self, width: int, height: int) -> tuple[Control, ...]:
        return tuple(
            Control(
                network=network,
                image=self._control_tensor(image, width, height),
                scale=control.conditioning_scale,
                start=control.guidance_start,
                end=control.guidance_end,
            )
            for control, network, image in zip(
                self.settled.controlnet or (),
                self.models.controlnets,
                self.request.control_images,
                strict=True,
            )
        )

    def _control_tensor(self, image: Image.Image | None, width: int, height: int) -> Tensor:
        """[1, 3, H, W]: a control image, or the canvas with its mask for an inpaint ControlNet."""
        canvas, mode = self.request.canvas, self.settled.resize_mode
        if image is not None:
            box = None if canvas is None else canvas.box
            return prepare_control(image, width, height, mode, box)
        assert canvas is not None  # `read_images` demands an image
        return inpaint_control(canvas)

    def _guided_steps(self, num_steps: int, before: int = 0, after: int = 0) -> range:
        """The steps with guidance of a pass that has `before` and `after` it other steps."""
        settled = self.settled
        if settled.guidance_scale <= 1:
            return range(0)
        total, shares = before + num_steps + after, (settled.guidance_start, settled.guidance_end)
        steps = [step for step in range(num_steps) if within(before + step, total, *shares)]
        return range(steps[0], steps[-1] + 1) if steps else range(0)


def compile_sampler(
    settled: SettledRequest,
    pipeline: Pipeline,
    start: Start,
    window: Window = WHOLE,
    num_steps: int | None = None,
) -> StepTable:
    """The compiled sampler a settled request asks for; the model's own where it names none.

    The scheduler is the one that the stock pipeline for the task would have. `num_steps` None: the
    request's.
    """
    own = pipeline.scheduler_config
    task = stock.pipeline_class(
        is_sdxl=pipeline.is_sdxl,
        image=not isinstance(start, FromNoise),
        inpaint=pipeline.inpaints or isinstance(start, Repaint),
        controlnet=bool(settled.controlnet),
    )
    spec = SamplerSpec(
        name=settled.scheduler or str(own["_class_name"]),
        sigmas=settled.sigmas,
        timestep_spacing=settled.timestep_spacing,
        eta=settled.eta,
    )
    config = stock.scheduler_config(task, own)
    return compile_table(spec, config, num_steps or settled.num_inference_steps, window)


def _encodes(start: Start) -> bool:
    """Whether the VAE encodes an image before the first step."""
    if isinstance(start, Enlarge):
        return start.upscaler != "latent"
    return isinstance(start, FromImage | Repaint)


def _steps_left_out(num_inference_steps: int, strength: float) -> int:
    """As `get_timesteps` of the stock img2img pipelines rounds."""
    return num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)


def _size_conditioning(settled: SettledRequest, height: int, width: int) -> SizeConditioning:
    return SizeConditioning(
        original_size=settled.original_size or (height, width),
        crops_coords_top_left=settled.crops_coords_top_left,
        target_size=settled.target_size or (height, width),
    )


def _negative_size_conditioning(
    settled: SettledRequest, positive: SizeConditioning, *, is_image_task: bool
) -> SizeConditioning:
    """As the stock SDXL pipelines: text to image takes the positive one unless both negative sizes
    are given; the others fill in each by itself, and have no negative crop but the refiner's."""
    original, target = settled.negative_original_size, settled.negative_target_size
    if is_image_task:
        return SizeConditioning(
            original_size=original or positive.original_size,
            crops_coords_top_left=positive.crops_coords_top_left,
            target_size=target or positive.target_size,
        )
    if original is None or target is None:
        return positive
    return SizeConditioning(original, settled.negative_crops_coords_top_left, target)
