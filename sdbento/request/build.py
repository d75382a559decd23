"""A settled request and its resident models to the trajectories that make its images.

One chain an image, of the legs that `legs` makes. Blocking: samplers are compiled, LoRAs read.
Knows nothing of doors or of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sdbento.engine.trajectory import Trajectory
from sdbento.errors import InvalidParameter
from sdbento.images.canvas import Canvas, Overlay, enlarge, prepare_canvas
from sdbento.lora.hooks import AdapterCache, WeightedAdapter
from sdbento.models.pipeline import Pipeline
from sdbento.prompts.inversions import Inversions
from sdbento.prompts.syntax import extract_loras
from sdbento.request.loras import choose_loras
from sdbento.request.passes import Draft, Leg, Resources
from sdbento.request.schema import GenerateRequest
from sdbento.request.settle import Pictures
from sdbento.settings import Settings


@dataclass(frozen=True, eq=False)
class Job:
    """What the engine is to do for one request, and what is to be done with the pictures then."""

    request: GenerateRequest  # settled
    trajectories: list[Trajectory]
    overlay: Overlay | None = None
    warnings: tuple[str, ...] = ()


class Assembler:
    """Makes jobs; keeps the LoRAs and textual inversions that they use. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._adapters = AdapterCache(settings)
        self._inversions = Inversions(settings)

    def assemble(
        self,
        settled: GenerateRequest,
        pictures: Pictures,
        resources: Resources,
        warnings: Sequence[str] = (),
    ) -> Job:
        """Raises InvalidParameter and its kin for what only the resident model can tell."""
        adapted, adapters = self._adapt(settled, resources.pipeline)
        _check_controlnets(settled, resources)
        canvas = _canvas(settled, pictures)
        draft = Draft(adapted, pictures, resources, adapters, canvas, self._inversions)
        legs = draft.legs()
        return Job(
            request=settled,
            trajectories=[_chain(legs, i, settled) for i in range(settled.num_images)],
            overlay=None if canvas is None else canvas.overlay,
            warnings=tuple(warnings),
        )

    def _adapt(
        self, settled: GenerateRequest, pipeline: Pipeline
    ) -> tuple[GenerateRequest, tuple[WeightedAdapter, ...]]:
        """The request without the LoRA tags of its prompts, and all its LoRAs."""
        prompt, tags = extract_loras(settled.prompt)
        prompt_2 = settled.prompt_2
        if prompt_2 is not None:
            prompt_2, more = extract_loras(prompt_2)
            tags = [*tags, *more]
        chosen = choose_loras(settled.lora or [], tags, self._settings)
        adapters = tuple(
            WeightedAdapter(
                self._adapters.get(pipeline, lora.name), lora.weight, lora.text_encoder_weight
            )
            for lora in chosen
        )
        return settled.model_copy(update={"prompt": prompt, "prompt_2": prompt_2}), adapters


def _chain(legs: list[Leg], image: int, settled: GenerateRequest) -> Trajectory:
    """The first leg of image number `image`, with its successors."""
    trajectories = [leg.trajectory(image, settled.preview_every) for leg in legs]
    for before, after in pairwise(trajectories):
        before.successor, after.predecessor = after, before
    return trajectories[0]


def _canvas(settled: GenerateRequest, pictures: Pictures) -> Canvas | None:
    if pictures.image is None:
        return None
    assert settled.width is not None and settled.height is not None
    if settled.upscale is not None:
        upscaler = settled.upscale.upscaler
        return Canvas(enlarge(pictures.image, settled.width, settled.height, upscaler))
    return prepare_canvas(
        pictures.image,
        settled.width,
        settled.height,
        settled.resize_mode,
        mask=pictures.mask,
        blur=settled.mask_blur or 0,
        crop_padding=settled.padding_mask_crop,
    )


_SHAPE = ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type")


def _check_controlnets(settled: GenerateRequest, resources: Resources) -> None:
    """That every ControlNet's residuals fit the UNet: what only the networks themselves tell."""
    unet = resources.pipeline.unet.config
    for i, network in enumerate(resources.controlnets):
        own = network.module.config
        if wrong := [name for name in _SHAPE if own.get(name) != unet.get(name)]:
            raise InvalidParameter(
                f"ControlNet {network.spec.name} does not fit model {settled.model}: its "
                f"{wrong[0]} is {own.get(wrong[0])}, not {unet.get(wrong[0])}",
                param=f"controlnet.{i}.type",
            )
