"""A body of txt2img or img2img as a request of ours, and what is lost on the way.

Knows nothing of HTTP, nor of how requests are run.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps
from pydantic import ValidationError

from sdbento.doors.a1111.bodies import MAX_CALL_IMAGES, NEUTRAL, Img2Img, Processing, Txt2Img, Unit
from sdbento.doors.a1111.notes import Notes
from sdbento.doors.a1111.sampling import sampling_fields
from sdbento.doors.a1111.units import controlnet, read_units, resize_mode
from sdbento.errors import InvalidParameter, NotFound
from sdbento.images import codec
from sdbento.request.parse import explain
from sdbento.request.schema import (
    MAX_STEPS,
    MAX_TOKEN_MERGING_RATIO,
    GenerateRequest,
    floor_side,
    nearest_side,
)
from sdbento.samplers.names import comparable, look_up

MAX_BLUR = 128
ROUNDING = 1e-9  # lest a size that is asked for be missed by a fraction of a pixel
UPSCALERS = {"none": "lanczos", "lanczos": "lanczos", "bicubic": "bicubic", "nearest": "nearest"}
# Values at which a setting changes nothing.
OFF: tuple[Any, ...] = (False, 0, [], {}, "None", "none", "Automatic", "automatic", "png")

# What the web UI reads in a prompt, and we do not.
SYNTAX = {
    "AND in a prompt": re.compile(r"\bAND\b"),
    "[a|b] in a prompt": re.compile(r"\[[^\[\]|]*\|[^\[\]]*\]"),
    "tags other than <lora:...>": re.compile(r"<(?!lora:)\w+:[^<>]*>", re.IGNORECASE),
}

Fields = dict[str, Any]


@dataclass(frozen=True)
class Translated:
    """`request` is that of the first of `num_images`; the others differ in their seeds alone."""

    request: GenerateRequest
    num_images: int
    notes: Notes


def translate(
    body: Txt2Img | Img2Img,
    model: str | None = None,
    refiner: str | None = None,
    mask: Image.Image | None = None,
    clip_stop: int = 1,
) -> Translated:
    """`model` and `refiner` are our names for those of `body`; None: the default, and none. `mask`
    is that of `body`, decoded; `clip_stop` the text encoder's layer to stop at, from the end, where
    `body` does not say.

    Blocking: a mask may have to be encoded. Raises NotFound, InvalidParameter, UnknownSampler.
    """
    if body.script_name is not None:
        raise InvalidParameter(f"Script '{body.script_name}' not found", param="script_name")
    num_images = body.batch_size * body.n_iter
    if num_images > MAX_CALL_IMAGES:
        raise InvalidParameter(
            f"batch_size x n_iter must be at most {MAX_CALL_IMAGES}; given: {num_images}",
            param="n_iter",
        )
    notes = Notes()
    fields = _common(body, clip_stop, notes) | {"model": model}
    units = read_units(body.alwayson_scripts, notes)
    if isinstance(body, Img2Img):
        fields |= _from_image(body, fields, mask, notes)
    else:
        fields |= _hires(body, fields, notes)
    if units:
        fields |= _controlnets(units, fields, notes)
    fields |= _refiner(body, refiner, fields, notes)
    for name in _not_applied(body, fields["scheduler"]):
        notes.ignore(name)
    try:
        return Translated(GenerateRequest(**fields), num_images, notes)
    except ValidationError as error:
        raise explain(error, "the request") from None


def _common(body: Processing, clip_stop: int, notes: Notes) -> Fields:
    steps = min(body.steps, MAX_STEPS)
    notes.change("steps", body.steps, steps)
    if body.cfg_scale < 1:
        notes.change("cfg_scale", body.cfg_scale, 1)  # as which anything below counts here
    asked = body.override_settings.token_merging_ratio
    token_merging_ratio = min(asked, MAX_TOKEN_MERGING_RATIO)
    notes.change("token_merging_ratio", asked, token_merging_ratio)
    return {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt or None,
        "clip_skip": _clip_skip(body, clip_stop),
        **_size(body, notes),
        "num_inference_steps": steps,
        "guidance_scale": body.cfg_scale,
        "token_merging_ratio": token_merging_ratio,
        "seed": body.seed if body.seed >= 0 else random.SystemRandom().randrange(2**32),
        **sampling_fields(body.sampler_name or body.sampler_index, body.scheduler, notes),
    }


def _clip_skip(body: Processing, clip_stop: int) -> int | None:
    """The web UI counts the layer to stop at, from the end; we count those that are left out."""
    stop_at = body.override_settings.CLIP_stop_at_last_layers or body.clip_skip or clip_stop
    return stop_at - 1 if stop_at > 1 else None


def _size(body: Processing, notes: Notes) -> Fields:
    width, height = body.width, body.height
    if isinstance(body, Txt2Img):  # without `enable_hr` too, as there
        width, height = body.firstphase_width or width, body.firstphase_height or height
    return {"width": _side("width", width, notes), "height": _side("height", height, notes)}


def _side(name: str, asked: int, notes: Notes) -> int:
    side = nearest_side(asked)
    notes.change(name, asked, side)
    return side


def _strength(asked: float, steps: int, notes: Notes) -> float:
    """As asked, but enough for one step."""
    if int(steps * asked) >= 1:
        return asked
    strength = min(1.0, 1 / steps + ROUNDING)
    notes.change("denoising_strength", asked, f"{strength:.3g}")
    return strength


def _hires(body: Txt2Img, fields: Fields, notes: Notes) -> Fields:
    if not body.enable_hr:
        return {}
    scale = _enlargement(body, fields["width"], fields["height"], notes)
    if scale <= 1:
        notes.ignore("enable_hr (the second pass would be no larger than the first)")
        return {}
    asked = body.hr_second_pass_steps or fields["num_inference_steps"]
    strength = _strength(body.denoising_strength, MAX_STEPS, notes)
    steps = _steps_in_all(asked, strength)
    notes.change("hr_second_pass_steps", asked, int(strength * steps))
    upscaler = _upscaler(body.hr_upscaler, notes)
    return {"hires": {"scale": scale, "steps": steps, "strength": strength, "upscaler": upscaler}}


def _steps_in_all(asked: int, strength: float) -> int:
    """Of which as many are done as are asked for, as far as there can be so many: the web UI does
    all of them, however little is denoised (`setup_img2img_steps`)."""
    steps = int(asked / strength)
    if int(strength * steps) < asked:
        steps += 1
    return min(steps, MAX_STEPS)


def _enlargement(body: Txt2Img, width: int, height: int, notes: Notes) -> float:
    x, y = body.hr_resize_x, body.hr_resize_y
    if not (x or y):
        return body.hr_scale
    scale = max(x / width, y / height)
    if scale > 1:
        scale += ROUNDING
    reached = [floor_side(scale * side) for side in (width, height)]
    if any(asked not in (0, side) for asked, side in zip((x, y), reached, strict=True)):
        notes.change("hr_resize", f"{x}x{y}", "x".join(map(str, reached)))
    return scale


def _upscaler(name: str, notes: Notes) -> str:
    key = name.casefold()
    upscaler = "latent" if key.startswith("latent") else UPSCALERS.get(key, "lanczos")
    if key not in (*UPSCALERS, "latent"):
        notes.change("hr_upscaler", name, upscaler)
    return upscaler


def _from_image(body: Img2Img, fields: Fields, mask: Image.Image | None, notes: Notes) -> Fields:
    if not body.init_images:
        raise NotFound("Init image not found")
    if len(body.init_images) > 1:
        notes.ignore("init_images after the first")
    if body.resize_mode == 3:
        notes.change("resize_mode", "3 (latent upscale)", "0 (just resize)")
    found: Fields = {
        "image": body.init_images[0],
        "strength": _strength(body.denoising_strength, fields["num_inference_steps"], notes),
        "resize_mode": ("stretch", "crop", "fit", "stretch")[body.resize_mode],
    }
    return found if mask is None else found | _masked(body, mask, notes)


def _masked(body: Img2Img, mask: Image.Image, notes: Notes) -> Fields:
    if body.inpainting_fill != 1:
        notes.change("inpainting_fill", body.inpainting_fill, 1)
    blur = _blur(body, notes)
    if blur == 0 and not body.inpaint_full_res:
        notes.ignore("mask_blur 0 (all pixels have been through the VAE)")
    return {
        "mask_image": _usable(mask, body.inpainting_mask_invert) or body.mask,
        "mask_blur": blur,
        "padding_mask_crop": body.inpaint_full_res_padding if body.inpaint_full_res else None,
    }


def _blur(body: Img2Img, notes: Notes) -> int:
    x, y = body.mask_blur_x, body.mask_blur_y
    asked = max(x, y) if body.mask_blur is None else body.mask_blur
    if body.mask_blur is None and x != y:
        notes.change("mask_blur", f"{x}x{y}", asked)
    blur = min(asked, MAX_BLUR)
    notes.change("mask_blur", asked, blur)
    return blur


def _usable(mask: Image.Image, invert: bool) -> str | None:
    """The mask with white where to repaint; None if it is so already. One with transparent parts is
    meant to repaint what is opaque (`create_binary_mask` in modules/processing.py)."""
    if not (invert or mask.has_transparency_data):
        return None
    if mask.has_transparency_data:
        mask = mask.getchannel("A").point(_binary)
    mask = mask.convert("L")
    return codec.as_base64(ImageOps.invert(mask) if invert else mask)


def _binary(value: int) -> int:
    return 255 if value > 128 else 0


def _controlnets(units: list[Unit], fields: Fields, notes: Notes) -> Fields:
    """Control images are brought to their size as the image to start from; without one, as the
    first unit says."""
    mode = fields.get("resize_mode") or resize_mode(units[0]) or "crop"
    side = min(fields["width"], fields["height"])
    for i, unit in enumerate(units):
        if "resize_mode" in unit.model_fields_set and resize_mode(unit) != mode:
            notes.ignore(f"ControlNet {i} resize_mode")
    controls = [controlnet(unit, i, side, notes) for i, unit in enumerate(units)]
    return {"controlnet": controls, "resize_mode": mode}


def _refiner(body: Processing, model: str | None, fields: Fields, notes: Notes) -> Fields:
    switch_at = 0.8 if body.refiner_switch_at is None else body.refiner_switch_at
    if model is None or switch_at == 1:
        return {}
    if switch_at == 0 or fields.get("hires") or fields.get("mask_image"):
        notes.ignore("refiner_checkpoint")
        return {}
    return {"refiner": {"model": model, "switch_at": switch_at}}


def _not_applied(body: Txt2Img | Img2Img, sampler: str) -> Iterator[str]:
    """What is known to the web UI, has no effect here, and would have one there."""
    for name, pattern in SYNTAX.items():
        if any(map(pattern.search, (body.prompt, body.negative_prompt))):
            yield name
    for name, value in body.undeclared.items():
        if _would_matter(name, value, body):
            yield name
    if body.eta is not None and not _is_usual_eta(body.eta, sampler):
        yield f"eta {body.eta:g}"
    settings = body.override_settings
    for name, value in settings.undeclared.items():
        if value not in OFF:
            yield f"override_settings.{name}"
    if settings.sd_model_checkpoint is not None and not body.override_settings_restore_afterwards:
        yield "override_settings_restore_afterwards"


def _would_matter(name: str, value: Any, body: Processing) -> bool:
    """Whether a field that is not declared for `body` has an effect in the web UI."""
    if name == "enable_hr":  # of img2img
        return value not in OFF
    if name not in NEUTRAL or value in NEUTRAL[name]:
        return False
    if name.startswith("hr_"):
        return (
            isinstance(body, Txt2Img) and body.enable_hr and not _as_first_pass(name, value, body)
        )
    return True


def _as_first_pass(name: str, value: Any, body: Processing) -> bool:
    first = {
        "hr_cfg": body.cfg_scale,
        "hr_negative_prompt": body.negative_prompt,
        "hr_prompt": body.prompt,
        "hr_sampler_name": body.sampler_name or body.sampler_index,
        "hr_scheduler": body.scheduler,
    }.get(name)
    if name in ("hr_sampler_name", "hr_scheduler"):  # which may be written in several ways
        return comparable(str(value)) == comparable(str(first))
    return bool(value == first)


def _is_usual_eta(eta: float, name: str) -> bool:
    """Whether a sampler works at that eta here. webuiapi sends 1 with every request, also with
    DDIM, which is not meant to become another sampler by that."""
    sampler = look_up(name)[0]
    if sampler.name in ("DDIM", "DDIM Parallel", "TCD"):
        return eta == 0
    return eta == 1 or not sampler.stochastic
