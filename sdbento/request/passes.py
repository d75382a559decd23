"""The legs of a request: what all its images have in common in each part of their chains.

One leg, or two where a refiner takes over or a second pass follows at a larger size. Sizes, steps
and draws are those of the stock pipelines. Knows nothing of names: LoRAs and models are resident.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sdbento.catalog.families import VAE_FACTOR
from sdbento.engine.trajectory import (
    BatchKey,
    Control,
    ImageInputs,
    SizeConditioning,
    Start,
    Trajectory,
    within,
)
from sdbento.images.canvas import Canvas, inpaint_control, prepare_control
from sdbento.lora.hooks import WeightedAdapter
from sdbento.models.pipeline import ControlNet, Pipeline
from sdbento.prompts.encoder import PreparedPrompt, prepare
from sdbento.prompts.inversions import Inversions
from sdbento.prompts.syntax import schedule
from sdbento.request.schema import GenerateRequest, Hires, Refiner
from sdbento.request.settle import Pictures, floor_side
from sdbento.samplers import stock
from sdbento.samplers.names import SamplerSpec, compile_table
from sdbento.samplers.step_table import WHOLE, StepTable, Window

Texts = tuple[tuple[int, PreparedPrompt], ...]


@dataclass(frozen=True, eq=False)
class Resources:
    """The resident models of one request; `controlnets` in the order of the request's."""

    pipeline: Pipeline
    controlnets: tuple[ControlNet, ...] = ()
    refiner: Pipeline | None = None


@dataclass(frozen=True, eq=False)
class Leg:
    """What all images of a request have in common in one leg of their chains."""

    pipeline: Pipeline
    width: int
    height: int
    inputs: ImageInputs  # with the first image's seed
    guided_steps: range
    decodes: bool = True

    def trajectory(self, image: int, preview_every: int) -> Trajectory:
        texts = [*self.inputs.prompts, *self.inputs.negative_prompts]
        key = BatchKey(
            self.pipeline.spec.name,
            self.height // VAE_FACTOR,
            self.width // VAE_FACTOR,
            max(text.num_chunks for _, text in texts),
        )
        return Trajectory(
            key=key,
            num_steps=self.inputs.table.num_steps,
            guided_steps=self.guided_steps,
            inputs=replace(self.inputs, seed=self.inputs.seed + image),
            preview_every=preview_every,
            pipeline=self.pipeline,
            decodes=self.decodes,
        )


@dataclass(frozen=True, eq=False)
class Draft:
    """One request while its legs are made."""

    settled: GenerateRequest
    pictures: Pictures
    resources: Resources
    adapters: tuple[WeightedAdapter, ...]
    canvas: Canvas | None
    inversions: Inversions

    def legs(self) -> list[Leg]:
        if self.settled.refiner is not None:
            return self._with_refiner(self.settled.refiner)
        first = self._first_leg(self._window())
        if self.settled.hires is not None:
            return self._with_second_pass(first, self.settled.hires)
        return [first]

    def _window(self) -> Window:
        steps, strength = self.settled.num_inference_steps, self.settled.strength
        assert steps is not None
        return WHOLE if strength is None else Window(_steps_left_out(steps, strength))

    def _first_leg(self, window: Window, steps_after: int = 0) -> Leg:
        settled, pipeline = self.settled, self.resources.pipeline
        assert settled.width is not None and settled.height is not None
        start = None
        if self.canvas is not None:
            mask = self.canvas.mask
            pure_noise = mask is not None and settled.strength == 1.0
            start = Start(self.canvas.pixels, mask, pure_noise)
        table = compile_sampler(settled, pipeline, window, start)
        guided = self._guided_steps(table.num_steps, after=steps_after)
        return self._leg(pipeline, table, start, settled.width, settled.height, guided)

    def _leg(
        self,
        pipeline: Pipeline,
        table: StepTable,
        start: Start | None,
        width: int,
        height: int,
        guided_steps: range,
    ) -> Leg:
        settled = self.settled
        assert settled.seed is not None and settled.guidance_scale is not None
        refines = start is not None and not start.add_noise
        prompts, negative_prompts = self._texts(pipeline, table.num_steps)
        size = _size_conditioning(settled, height, width)
        negative_size = _negative_size_conditioning(settled, size, is_image_task=start is not None)
        if pipeline.requires_aesthetics_score:
            scores = settled.refiner or Refiner()
            size = replace(size, aesthetic_score=scores.aesthetic_score)
            negative_size = replace(
                negative_size,
                crops_coords_top_left=settled.negative_crops_coords_top_left,
                aesthetic_score=scores.negative_aesthetic_score,
            )
        inputs = ImageInputs(
            prompts=prompts,
            negative_prompts=negative_prompts,
            seed=settled.seed,
            guidance_scale=settled.guidance_scale,
            guidance_rescale=settled.guidance_rescale,
            table=table,
            size=size,
            negative_size=negative_size,
            start=start,
            controls=() if refines else self._controls(width, height),
            adapters=() if refines else self.adapters,
        )
        return Leg(pipeline, width, height, inputs, guided_steps)

    def _texts(self, pipeline: Pipeline, num_steps: int) -> tuple[Texts, Texts]:
        settled = self.settled
        negative = settled.negative_prompt
        if negative is None and settled.negative_prompt_2 is not None:
            negative = ""
        return (
            self._scheduled(
                pipeline, settled.prompt, settled.prompt_2, num_steps, settled.clip_skip
            ),
            self._scheduled(pipeline, negative, settled.negative_prompt_2, num_steps),
        )

    def _scheduled(
        self,
        pipeline: Pipeline,
        text: str | None,
        text_2: str | None,
        num_steps: int,
        clip_skip: int | None = None,  # the stock pipelines skip nothing in the negative prompt
    ) -> Texts:
        """Prompts by the step from which they hold; more than one where the text is edited."""
        options: dict[str, Any] = {"clip_skip": clip_skip, "inversions": self.inversions}
        if text is None:
            return ((0, prepare(pipeline, None, **options)),)
        if text_2 is not None and pipeline.pipe.text_encoder is None:  # the refiner has the second
            text, text_2 = text_2, None
        one = dict(schedule(text, num_steps))
        two = dict(schedule(text_2, num_steps)) if text_2 is not None else {}
        texts: list[tuple[int, PreparedPrompt]] = []
        for step in sorted({*one, *two}):
            text, text_2 = one.get(step, text), two.get(step, text_2)
            texts.append((step, prepare(pipeline, text, text_2=text_2, **options)))
        return tuple(texts)

    def _controls(self, width: int, height: int) -> tuple[Control, ...]:
        asked = self.settled.controlnet or []
        mode, box = self.settled.resize_mode, None if self.canvas is None else self.canvas.box
        controls = []
        for i, control in enumerate(asked):
            picture = self.pictures.controls[i]
            if picture is not None:
                image = prepare_control(picture, width, height, mode, box)
            elif self.canvas is not None:
                image = inpaint_control(self.canvas)
            controls.append(
                Control(
                    network=self.resources.controlnets[i],
                    image=image,
                    scale=control.conditioning_scale,
                    start=control.guidance_start,
                    end=control.guidance_end,
                )
            )
        return tuple(controls)

    def _guided_steps(self, num_steps: int, before: int = 0, after: int = 0) -> range:
        """The steps with guidance of a leg that has `before` and `after` it other steps."""
        settled = self.settled
        assert settled.guidance_scale is not None
        if settled.guidance_scale <= 1:
            return range(0)
        total, shares = before + num_steps + after, (settled.guidance_start, settled.guidance_end)
        steps = [step for step in range(num_steps) if within(before + step, total, *shares)]
        return range(steps[0], steps[-1] + 1) if steps else range(0)

    def _with_refiner(self, refiner: Refiner) -> list[Leg]:
        """Base and refiner as an "ensemble of expert denoisers": the second goes on with the
        latents, noise and all, at the noise level where the first has stopped."""
        settled, pipeline = self.settled, self.resources.refiner
        assert pipeline is not None and settled.width is not None and settled.height is not None
        start = Start(add_noise=False)
        table = compile_sampler(settled, pipeline, Window(denoising_start=refiner.switch_at), start)
        window = replace(self._window(), denoising_end=refiner.switch_at)
        first = self._first_leg(window, steps_after=table.num_steps)
        guided = self._guided_steps(table.num_steps, before=first.inputs.table.num_steps)
        second = self._leg(pipeline, table, start, settled.width, settled.height, guided)
        return [replace(first, decodes=False), second]

    def _with_second_pass(self, first: Leg, hires: Hires) -> list[Leg]:
        """Image to image at a larger size, from what the first pass has made."""
        width, height = (floor_side(hires.scale * side) for side in (first.width, first.height))
        steps = hires.steps or self.settled.num_inference_steps
        assert steps is not None
        again = self.settled.model_copy(update={"num_inference_steps": steps})
        window = Window(_steps_left_out(steps, hires.strength))
        start = Start(upscaler=hires.upscaler)
        table = compile_sampler(again, first.pipeline, window, start)
        guided = self._guided_steps(table.num_steps)
        second = self._leg(first.pipeline, table, start, width, height, guided)
        return [replace(first, decodes=hires.upscaler != "latent"), second]


def compile_sampler(
    settled: GenerateRequest,
    pipeline: Pipeline,
    window: Window = WHOLE,
    start: Start | None = None,
) -> StepTable:
    """The compiled sampler a settled request asks for; the model's own where it names none.

    The scheduler is the one that the stock pipeline for the task would have.
    """
    assert settled.num_inference_steps is not None
    own = pipeline.scheduler_config
    task = stock.pipeline_class(
        is_sdxl=pipeline.is_sdxl,
        image=start is not None,
        inpaint=pipeline.inpaints or (start is not None and start.mask is not None),
        controlnet=bool(settled.controlnet),
    )
    spec = SamplerSpec(
        name=settled.scheduler or str(own["_class_name"]),
        sigmas=settled.sigmas,
        timestep_spacing=settled.timestep_spacing,
        eta=settled.eta,
    )
    config = stock.scheduler_config(task, own)
    return compile_table(spec, config, settled.num_inference_steps, window)


def _steps_left_out(num_inference_steps: int, strength: float) -> int:
    """As `get_timesteps` of the stock img2img pipelines rounds."""
    return num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)


def _size_conditioning(settled: GenerateRequest, height: int, width: int) -> SizeConditioning:
    return SizeConditioning(
        original_size=settled.original_size or (height, width),
        crops_coords_top_left=settled.crops_coords_top_left,
        target_size=settled.target_size or (height, width),
    )


def _negative_size_conditioning(
    settled: GenerateRequest, positive: SizeConditioning, *, is_image_task: bool
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
