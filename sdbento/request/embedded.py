"""What files say of how their image was made: AUTOMATIC1111's infotext, and our own parameters.

Files are passed on, so both are redacted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sdbento
from sdbento.images import infotext
from sdbento.images.redaction import public_name, without_secrets
from sdbento.request.schema import GenerateRequest
from sdbento.request.settle import SettledRequest
from sdbento.samplers.names import look_up

_NAMES = {"model", "model_id", "type"}  # fields that may hold a path

Pairs = Iterator[tuple[str, object]]


def infotext_of(request: SettledRequest, sampler: str, seed: int) -> str:
    """The infotext of the image with that `seed`; `sampler` made it, which may be the model's own.

    Its order is that of the web UI.
    """
    negative = without_secrets(request.negative_prompt or "")
    return infotext.write(_prompt(request), negative, _pairs(request, sampler, seed))


def public(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, as JSON, without what must not leave this machine."""
    return {name: _public(name, value) for name, value in parameters.items()}


def _public(field: str, value: Any) -> Any:
    match value:
        case str():
            return public_name(value) if field in _NAMES else without_secrets(value)
        case dict():
            return public(value)
        case list():
            return [_public(field, item) for item in value]
    return value


def _prompt(request: GenerateRequest) -> str:
    """With a tag for each LoRA that the request lists: there is no other way to say so."""
    loras = request.lora or ()
    tags = [_tag(lora.model_id, lora.weight, lora.text_encoder_weight) for lora in loras]
    return " ".join([without_secrets(request.prompt), *tags]).strip()


def _tag(name: str, weight: float, text_encoder_weight: float | None) -> str:
    weights = f"{weight:g}"
    if text_encoder_weight not in (None, weight):
        weights = f"{text_encoder_weight:g}:{weights}"
    return f"<lora:{public_name(name)}:{weights}>"


def _pairs(request: SettledRequest, sampler: str, seed: int) -> Pairs:
    found, sigmas = look_up(sampler)
    yield "Steps", request.num_inference_steps
    yield "Sampler", found.name
    yield "Schedule type", (request.sigmas or sigmas or "automatic").capitalize()
    yield "CFG scale", f"{request.guidance_scale:g}"
    yield "Seed", seed
    yield "Size", f"{request.width}x{request.height}"
    yield "Model", public_name(request.model)
    strength = request.strength if request.hires is None else request.hires.strength
    if strength is not None:
        yield "Denoising strength", f"{strength:g}"
    if request.clip_skip is not None:
        yield "Clip skip", request.clip_skip + 1  # the web UI counts the layer it ends at
    if request.mask_blur:
        yield "Mask blur", request.mask_blur
    yield from _passes(request)
    yield from _controlnets(request)
    yield "Version", f"sdbento {sdbento.__version__}"


def _passes(request: SettledRequest) -> Pairs:
    if (hires := request.hires) is not None:
        yield "Hires upscale", f"{hires.scale:g}"
        steps = hires.steps or request.num_inference_steps
        yield "Hires steps", int(steps * hires.strength)  # the web UI counts those that are done
        yield "Hires upscaler", hires.upscaler.capitalize()
    if (refiner := request.refiner) is not None:
        yield "Refiner", public_name(refiner.model)
        yield "Refiner switch at", f"{refiner.switch_at:g}"


def _controlnets(request: SettledRequest) -> Pairs:
    for i, control in enumerate(request.controlnet or ()):
        name = public_name(control.type)
        yield (
            f"ControlNet {i}",
            f"Module: {name if control.preprocess else 'none'}, Model: {name}, "
            f"Weight: {control.conditioning_scale:g}, "
            f"Guidance Start: {control.guidance_start:g}, Guidance End: {control.guidance_end:g}",
        )
