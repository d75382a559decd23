"""Inputs and outputs of RunPod's worker-sdxl, in our terms.

That worker has two models. Without `image_url` SDXL draws, up to the share `high_noise_frac` of the
noise levels, and the refiner goes over the result. With `image_url` the refiner alone changes the
image, in `refiner_inference_steps` steps; of the other fields it reads `prompt`, `seed` and
`strength` (runpod-workers/worker-sdxl, handler.py). Here the refiner takes over from the model, and
the request's own model changes images.
"""

from __future__ import annotations

from typing import Any

from sdbento.errors import InvalidParameter
from sdbento.images.codec import MEDIA_TYPES
from sdbento.outbound.urls import is_url
from sdbento.request.schema import GenerateResponse, OutputFormat

Fields = dict[str, Any]

NAMES = {"image_url", "high_noise_frac", "refiner_inference_steps"}  # that only it has

# What that worker does with fields that are absent.
SIZE = {"width": 1024, "height": 1024}
DRAWING = {"num_inference_steps": 25, "guidance_scale": 7.5, "scheduler": "DDIM", **SIZE}
REFINING = {"num_inference_steps": 50, "strength": 0.3}


def translated(given: Fields, *, own: bool) -> tuple[Fields, list[str]]:
    """The fields of a request of ours, and warnings about what is done otherwise than there.

    Names that only worker-sdxl has are understood in any input. own: whether its format is asked
    for: then its defaults are used, and null means absent. Raises InvalidParameter if a field is
    given under both names.
    """
    fields = {name: value for name, value in given.items() if value is not None or not own}
    if (image := _taken(fields, "image_url", instead_of="image")) not in (None, ""):
        fields["image"] = image
    share = _taken(fields, "high_noise_frac", instead_of="refiner")
    if share not in (None, 1):  # 1: the model does it all
        fields["refiner"] = {"switch_at": share}
    has_image = fields.get("image") is not None
    warnings = _use_refiner_steps(fields, has_image)
    if own:
        warnings += _leave_out(fields, has_image)
        fields = (REFINING if has_image else DRAWING) | fields
    return fields, warnings


def output(response: GenerateResponse, kind: OutputFormat, warnings: list[str]) -> Fields:
    """What worker-sdxl returns, and `warnings`, which it has not, if there are any."""
    prefix = f"data:{MEDIA_TYPES[kind]};base64,"
    images = [image if is_url(image) else prefix + image for image in response.images]
    answer: Fields = {"images": images, "image_url": images[0], "seed": response.seeds[0]}
    return answer | {"warnings": warnings} if warnings else answer


def _taken(fields: Fields, theirs: str, *, instead_of: str) -> Any:
    """Remove a field that only worker-sdxl has. Returns its value, None if it is absent."""
    value = fields.pop(theirs, None)
    if value is not None and fields.get(instead_of) is not None:
        raise InvalidParameter(f"{theirs} does not go together with {instead_of}", param=theirs)
    return value


def _use_refiner_steps(fields: Fields, has_image: bool) -> list[str]:
    if (steps := fields.pop("refiner_inference_steps", None)) is None:
        return []
    if not has_image:
        return ["refiner_inference_steps is not used: a refiner does part of num_inference_steps"]
    unused = fields.get("num_inference_steps") is not None
    fields["num_inference_steps"] = steps
    return ["num_inference_steps is not used beside refiner_inference_steps"] if unused else []


def _leave_out(fields: Fields, has_image: bool) -> list[str]:
    """Remove the fields that worker-sdxl would not read. Returns warnings."""
    unread = ("width", "height") if has_image else ("strength",)
    reason = "the result has the size of the image" if has_image else "there is no image"
    warnings = [f"{name} is not used: {reason}" for name in unread if name in fields]
    for name in unread:
        fields.pop(name, None)
    if has_image:
        warnings.append("the image is changed by the request's model, there by the refiner")
    elif "refiner" not in fields:
        warnings.append("no refiner took part: high_noise_frac says where it takes over")
    return warnings
