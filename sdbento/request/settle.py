"""From a request to a settled one: limits, defaults, seed, size.

`check_fields` needs only the model's spec, so that a bad request is refused before an image is
fetched; `settle` decides what is left open. Knows nothing of doors, of resident models or of the
engine.
"""

from __future__ import annotations

import math
import random
from typing import Any

from sdbento.catalog.families import Family
from sdbento.catalog.specs import ModelSpec
from sdbento.errors import InvalidParameter
from sdbento.images.codec import PIXELS_FACTOR
from sdbento.prompts.check import check_second_prompt
from sdbento.request.schema import ControlNetInput, GenerateRequest, floor_side
from sdbento.samplers.names import canonical_name

# Where the request does not say: for all models, though some stock pipelines have their own.
STRENGTH, MASKED_STRENGTH = 0.8, 1.0
OUTPAINT_BLUR = 8  # pixels, where an outpainting request does not say
NEED_IMAGE = ("mask_image", "outpaint", "strength", "upscale")
NEED_MASK = ("mask_blur", "padding_mask_crop")
NOT_WITH_MASK = ("hires", "refiner", "upscale")

Size = tuple[int, int]  # width, height


class SettledRequest(GenerateRequest):
    """A request with everything decided: a field that is None now is not used.

    Except `scheduler`, where None is the model's own. `strength` is None for text to image.
    """

    model: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int


def check_fields(request: GenerateRequest, spec: ModelSpec) -> None:
    """Raises InvalidParameter for fields that do not go together, UnknownSampler for a sampler."""
    given = {name for name in type(request).model_fields if getattr(request, name) is not None}
    _demand(given, NEED_IMAGE, {"image"}, "image")
    _demand(given, NEED_MASK, {"mask_image", "outpaint"}, "mask_image or outpaint")
    if _is_masked(request):
        _refuse(given, NOT_WITH_MASK, "mask_image and outpaint")
    if "hires" in given:
        _refuse(given, ("refiner", "upscale"), "hires")
    if "upscale" in given:
        _refuse(given, ("strength", "width", "height", "refiner"), "upscale")
    if "refiner" in given and spec.family is not Family.SDXL:
        raise InvalidParameter(
            f"refiner is for SDXL models; {spec.name} is not one", param="refiner"
        )
    for field in ("prompt_2", "negative_prompt_2"):
        if field in given:
            check_second_prompt(spec, param=field)
    if request.deep_cache_interval > 1:
        _refuse(given, ("controlnet",), "deep_cache_interval")
    _check_intervals(request)
    if (sampler := request.scheduler or spec.sampler) is not None:
        canonical_name(sampler)


def settle(
    request: GenerateRequest, spec: ModelSpec, sent: Size | None, max_pixels: int
) -> tuple[SettledRequest, list[str]]:
    """The request, as `check_fields` has passed it, with everything decided, and warnings about it.

    `sent`: width and height of the image that was sent along, if any. Raises InvalidParameter for a
    size above `max_pixels`.
    """
    width, height, warnings = _size(request, spec, sent, max_pixels)
    if request.padding_mask_crop is not None and sent is not None:
        _check_originals(request.num_images, sent, max_pixels)
    steps, guidance_scale = request.num_inference_steps, request.guidance_scale
    decided: dict[str, Any] = {
        "model": spec.name,
        "width": width,
        "height": height,
        "num_inference_steps": spec.num_inference_steps if steps is None else steps,
        "guidance_scale": spec.guidance_scale if guidance_scale is None else guidance_scale,
        "seed": request.seed,
        "scheduler": request.scheduler or spec.sampler,
        "strength": _strength(request),
        "mask_blur": mask_blur(request),
    }
    if request.seed in (None, -1):
        decided["seed"] = random.SystemRandom().randrange(2**32)
    return SettledRequest.model_construct(**dict(request) | decided), warnings


def mask_blur(request: GenerateRequest) -> int | None:
    """The blur that is meant: an outpainted margin fades in where the request does not say."""
    if request.outpaint is not None and request.mask_blur is None:
        return OUTPAINT_BLUR
    return request.mask_blur


def _strength(request: GenerateRequest) -> float | None:
    if request.upscale is not None:
        return request.upscale.strength
    if request.image is not None and request.strength is None:
        return MASKED_STRENGTH if _is_masked(request) else STRENGTH
    return request.strength


def _is_masked(request: GenerateRequest) -> bool:
    return request.mask_image is not None or request.outpaint is not None


def _demand(given: set[str], fields: tuple[str, ...], needed: set[str], words: str) -> None:
    for field in fields:
        if field in given and not given & needed:
            raise InvalidParameter(f"{field} needs {words}", param=field)


def _refuse(given: set[str], fields: tuple[str, ...], other: str) -> None:
    for field in fields:
        if field in given:
            raise InvalidParameter(f"{field} does not go together with {other}", param=field)


def _check_intervals(request: GenerateRequest) -> None:
    intervals: list[tuple[str, GenerateRequest | ControlNetInput]] = [
        ("", request),
        *((f"controlnet.{i}.", c) for i, c in enumerate(request.controlnet or ())),
    ]
    for place, interval in intervals:
        if interval.guidance_start > interval.guidance_end:
            raise InvalidParameter(
                f"{place}guidance_end must not be below {place}guidance_start",
                param=f"{place}guidance_end",
            )


def _size(
    request: GenerateRequest, spec: ModelSpec, sent: Size | None, max_pixels: int
) -> tuple[int, int, list[str]]:
    """Width, height, and what the user should know of them.

    What is absent is that of the image that was sent, else the model's own.
    """
    warnings: list[str] = []
    width, height = request.width, request.height
    if sent is None:
        width, height = width or spec.width, height or spec.height
    elif request.upscale is not None:
        width, height = (floor_side(request.upscale.scale * side) for side in sent)
    elif width is None and height is None:
        width, height = _natural_size(*sent, max_pixels)
        if width * height < 0.9 * sent[0] * sent[1]:
            warnings.append(
                f"the image of {sent[0]} x {sent[1]} was reduced to {width} x {height}: at most "
                f"{max_pixels} pixels are allowed"
            )
    else:
        width, height = width or floor_side(sent[0]), height or floor_side(sent[1])
    scale = 1.0 if request.hires is None else request.hires.scale
    _check_pixels(floor_side(scale * width), floor_side(scale * height), max_pixels)
    return width, height, warnings


def _natural_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """An image's own size, brought within the limits at the same ratio."""
    reduced = min(1.0, math.sqrt(max_pixels / (width * height)))
    return floor_side(reduced * width), floor_side(reduced * height)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise InvalidParameter(
            f"width x height must be at most {max_pixels} pixels; "
            f"given: {width} x {height} = {width * height}",
            param="width",
        )


def _check_originals(num_images: int, original: Size, max_pixels: int) -> None:
    """The results of `padding_mask_crop` are as large as the image that was sent."""
    width, height = original
    limit = PIXELS_FACTOR * max_pixels
    if num_images * width * height > limit:
        raise InvalidParameter(
            f"with padding_mask_crop every result is as large as the image, {width} x {height}, "
            f"and all of them may have {limit} pixels ({PIXELS_FACTOR} x SDBENTO_MAX_PIXELS); send "
            "a smaller image or ask for fewer images",
            param="num_images" if width * height <= limit else "image",
        )
