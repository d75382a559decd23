"""From a request to a settled one: defaults, limits, seeds, pictures and sizes.

`settle` needs only the catalogue, so that a bad request is refused before anything is fetched or
loaded; `gather` reads the pictures; `fix_size` decides what only they can tell. What is then made
of it is `assembly`'s business. Knows nothing of doors or of the engine.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from sdbento.catalog.families import VAE_FACTOR, Family
from sdbento.catalog.specs import ModelSpec
from sdbento.errors import InvalidParameter
from sdbento.images import codec
from sdbento.images.canvas import extend, resized
from sdbento.images.preprocessors import preprocess
from sdbento.request.schema import ControlNetInput, GenerateRequest
from sdbento.samplers.names import canonical_name
from sdbento.settings import Settings

STRENGTH, MASKED_STRENGTH = 0.8, 1.0  # where the request does not say; the stock pipelines' own
OUTPAINT_BLUR = 8
MIN_SIDE = 64
NEED_IMAGE = ("mask_image", "outpaint", "strength", "upscale")
NEED_MASK = ("mask_blur", "padding_mask_crop")
NOT_WITH_MASK = ("hires", "refiner", "upscale")


@dataclass(frozen=True, eq=False)
class Pictures:
    """What a request brings along, decoded. `controls` are in the order of its ControlNets."""

    image: Image.Image | None = None
    mask: Image.Image | None = None
    controls: tuple[Image.Image | None, ...] = ()


def settle(request: GenerateRequest, spec: ModelSpec) -> GenerateRequest:
    """The request with everything decided that no picture is needed for.

    Raises InvalidParameter for fields that do not go together, UnknownSampler for a sampler.
    """
    _check_combination(request, spec)
    decided: dict[str, Any] = {"model": spec.name}
    for field in ("num_inference_steps", "guidance_scale"):
        if getattr(request, field) is None:
            decided[field] = getattr(spec, field)
    if request.seed in (None, -1):
        decided["seed"] = random.SystemRandom().randrange(2**32)
    sampler = request.scheduler or spec.sampler
    if sampler is not None:
        decided["scheduler"] = sampler
        canonical_name(sampler)
    if request.upscale is not None:
        decided["strength"] = request.upscale.strength
    elif request.image is not None and request.strength is None:
        decided["strength"] = MASKED_STRENGTH if _is_masked(request) else STRENGTH
    if request.outpaint is not None and request.mask_blur is None:
        decided["mask_blur"] = OUTPAINT_BLUR
    return request.model_copy(update=decided)


def _is_masked(request: GenerateRequest) -> bool:
    return request.mask_image is not None or request.outpaint is not None


def _check_combination(request: GenerateRequest, spec: ModelSpec) -> None:
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


def _demand(given: set[str], fields: tuple[str, ...], needed: set[str], words: str) -> None:
    for field in fields:
        if field in given and not given & needed:
            raise InvalidParameter(f"{field} needs {words}", param=field)


def _refuse(given: set[str], fields: tuple[str, ...], other: str) -> None:
    for field in fields:
        if field in given:
            raise InvalidParameter(f"{field} does not go together with {other}", param=field)


def needs_pictures(request: GenerateRequest) -> bool:
    """Whether there is anything to gather."""
    return bool(request.image is not None or request.mask_image is not None or request.controlnet)


def has_urls(request: GenerateRequest) -> bool:
    """Whether a picture has to be fetched from somewhere."""
    sources = [request.image, request.mask_image, *(c.image for c in request.controlnet or ())]
    return any(source is not None and codec.is_url(source) for source in sources)


def gather(request: GenerateRequest, settings: Settings) -> Pictures:
    """Fetch and decode the pictures.

    Blocking, for as long as hosts take. Raises InvalidParameter or TooLarge naming the field.
    """
    image = mask = None
    if request.image is not None:
        image = codec.read(request.image, settings, param="image")
    if request.mask_image is not None:
        mask = codec.read(request.mask_image, settings, param="mask_image")
    if request.outpaint is not None:
        assert image is not None and request.mask_blur is not None
        out = request.outpaint
        margins = (out.left, out.top, out.right, out.bottom)
        image, mask = extend(image, mask, margins, overlap=2 * request.mask_blur)
    controls = tuple(
        _control_image(control, image, settings, f"controlnet.{i}.image")
        for i, control in enumerate(request.controlnet or ())
    )
    return Pictures(image, mask, controls)


def _control_image(
    control: ControlNetInput, image: Image.Image | None, settings: Settings, param: str
) -> Image.Image | None:
    """None: the picture with its mask, which an inpaint ControlNet reads."""
    picture = image
    if control.image is not None:
        picture = codec.read(control.image, settings, param=param)
    elif control.type == "inpaint":
        return None
    if picture is None:
        raise InvalidParameter(f"{param} is required where there is no image", param=param)
    return picture


def draw_controls(settled: GenerateRequest, pictures: Pictures) -> Pictures:
    """The pictures with control images in place of those that are to be preprocessed.

    At the size of the image to come: the edges of a large photo would vanish when it is reduced.
    Blocking. Raises InvalidParameter where a preprocessor is not installed.
    """
    assert settled.width is not None and settled.height is not None
    drawn = list(pictures.controls)
    for i, control in enumerate(settled.controlnet or ()):
        picture = drawn[i]
        if control.preprocess and picture is not None:
            if settled.padding_mask_crop is None:
                picture = resized(picture, settled.width, settled.height, settled.resize_mode)
            drawn[i] = preprocess(control.type, picture)
    return replace(pictures, controls=tuple(drawn))


def fix_size(
    settled: GenerateRequest, spec: ModelSpec, pictures: Pictures, max_pixels: int
) -> tuple[GenerateRequest, list[str]]:
    """The request with its width and height, and what the user should know of them.

    Absent ones are those of the picture, else of the control image, else the model's own. Raises
    InvalidParameter for a size above `max_pixels`.
    """
    warnings: list[str] = []
    width, height = settled.width, settled.height
    shown = [pictures.image, *pictures.controls]
    reference = next((picture for picture in shown if picture is not None), None)
    if settled.upscale is not None and reference is not None:
        scale = settled.upscale.scale
        width, height = (floor_side(scale * side) for side in reference.size)
    elif reference is not None and width is None and height is None:
        width, height = _natural_size(*reference.size, max_pixels)
        if width * height < 0.9 * reference.width * reference.height:
            warnings.append(
                f"the picture of {reference.width} x {reference.height} was reduced to {width} x "
                f"{height}: at most {max_pixels} pixels are allowed"
            )
    elif reference is not None:
        width, height = width or floor_side(reference.width), height or floor_side(reference.height)
    width, height = width or spec.width, height or spec.height
    scale = 1.0 if settled.hires is None else settled.hires.scale
    _check_pixels(floor_side(scale * width), floor_side(scale * height), max_pixels)
    return settled.model_copy(update={"width": width, "height": height}), warnings


def floor_side(side: float) -> int:
    """A length in pixels as latents can have it."""
    return max(MIN_SIDE, int(side) // VAE_FACTOR * VAE_FACTOR)


def _natural_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """A picture's own size, brought within the limits at the same ratio."""
    reduced = min(1.0, math.sqrt(max_pixels / (width * height)))
    return floor_side(reduced * width), floor_side(reduced * height)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise InvalidParameter(
            f"width x height must be at most {max_pixels} pixels; "
            f"given: {width} x {height} = {width * height}",
            param="width",
        )
