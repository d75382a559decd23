"""The fields of a request as keyword arguments, and the request that they make.

Names, types and bounds are those of `request/schema.py`; images may be given in more ways here.
Knows nothing of HTTP.
"""

from __future__ import annotations

import json
import os
from base64 import b64encode
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, Required, TypedDict

from PIL import Image, ImageOps

from sdbento.errors import InvalidParameter
from sdbento.request.parse import parse
from sdbento.request.schema import OutputFormat, Upscaler

ImageInput = str | bytes | os.PathLike[str] | BinaryIO | Image.Image
"""A PIL image; a file's bytes, its path or the open file; or as text a URL, a data URI or base64.

Only the server opens URLs. Text is never a path.
"""


class ControlNet(TypedDict, total=False):
    type: Required[str]
    image: ImageInput | None
    conditioning_scale: float
    guidance_start: float
    guidance_end: float
    preprocess: bool


class Lora(TypedDict, total=False):
    model_id: Required[str]
    weight: float
    text_encoder_weight: float | None


class Outpaint(TypedDict, total=False):
    left: int
    right: int
    top: int
    bottom: int


class Refiner(TypedDict, total=False):
    model: str
    switch_at: float
    aesthetic_score: float
    negative_aesthetic_score: float


class Upscale(TypedDict, total=False):
    scale: float
    strength: float
    upscaler: Upscaler


class Hires(TypedDict, total=False):
    scale: float
    steps: int | None
    strength: float
    upscaler: Literal["lanczos", "bicubic", "nearest", "latent"]


class Policy(TypedDict, total=False):
    """How long a job may wait and run, in ms, within RunPod's limits."""

    executionTimeout: int
    ttl: int
    lowPriority: bool


class EditFields(TypedDict, total=False):
    """What can be asked for beside a prompt, an image and a mask. docs/requests.md explains it."""

    negative_prompt: str | None
    prompt_2: str | None
    negative_prompt_2: str | None
    clip_skip: int | None
    model: str | None
    strength: float | None
    mask_blur: int | None
    padding_mask_crop: int | None
    outpaint: Outpaint | None
    resize_mode: Literal["stretch", "crop", "fit"]
    width: int | None
    height: int | None
    controlnet: ControlNet | list[ControlNet] | None
    lora: Lora | list[Lora] | None
    refiner: Refiner | None
    hires: Hires | None
    upscale: Upscale | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_rescale: float
    guidance_start: float
    guidance_end: float
    deep_cache_interval: int
    token_merging_ratio: float
    seed: int | None
    num_images: int
    scheduler: str | None
    sigmas: Literal["normal", "karras", "exponential", "beta"] | None
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None
    eta: float
    output_format: OutputFormat
    output_compression: int | None
    timeout: float | None
    preview_every: int
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crops_coords_top_left: tuple[int, int]
    negative_target_size: tuple[int, int] | None


class Fields(EditFields, total=False):
    """What can be asked for beside a prompt."""

    image: ImageInput | None
    mask_image: ImageInput | None


def as_request(prompt: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The request as an object for JSON, once it has been checked as the server checks it.

    Reads the files among `fields`. Raises what the server would answer (InvalidParameter,
    MalformedRequest), OSError for a file, and TypeError for what no JSON can hold.
    """
    request = {"prompt": prompt, **_with_sources(fields)}
    match request.get("controlnet"):
        case Mapping() as net:
            request["controlnet"] = _with_sources(net)
        case list() | tuple() as nets:
            request["controlnet"] = [
                _with_sources(net) if isinstance(net, Mapping) else net for net in nets
            ]
    parse(json.dumps(request), what="the request")
    return request


def _with_sources(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields`, with images as the server reads them."""
    given = dict(fields)
    for name in ("image", "mask_image"):
        if given.get(name) is not None:
            given[name] = image_source(given[name], name)
    return given


def image_source(image: ImageInput, param: str) -> str:
    """An image as a URL, a data URI or base64. Raises OSError, TypeError, InvalidParameter."""
    match image:
        case str():
            return _not_a_path(image, param)
        case bytes():
            data = image
        case os.PathLike():
            data = Path(image).read_bytes()
        case Image.Image():
            data = _png(image)
        case _ if hasattr(image, "read"):
            data = image.read()
        case _:
            raise TypeError(f"{param} cannot be made of {type(image).__name__}")
    return b64encode(data).decode("ascii")


def _not_a_path(text: str, param: str) -> str:
    """`text`, unless it looks like a file's name: base64 has no dot."""
    if "." in text[:500] and not text.lower().startswith(("data:", "http:", "https:")):
        raise InvalidParameter(
            f"{param} must be a URL, a data URI or base64 where it is text; give a file by "
            f"pathlib.Path; given: {text[:80]!r}",
            param=param,
        )
    return text


def _png(image: Image.Image) -> bytes:
    """The image as people see it, like the server reads a file: its EXIF orientation applied."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        upright = upright.convert("RGB")
    buffer = BytesIO()
    upright.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
