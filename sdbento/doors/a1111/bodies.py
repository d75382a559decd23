"""What txt2img and img2img are sent, as leniently as AUTOMATIC1111's web UI reads it.

Unknown fields are ignored; null and "" mean that a field is absent; numbers may be text. Fields
that are known there and have no effect here are not declared: `NEUTRAL` lists them. Defaults are
those of the web UI (modules/processing.py, modules/api/models.py).
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sdbento.doors.docs.bodies import empty_counts_as_absent
from sdbento.request.schema import MAX_CLIP_SKIP, MAX_PROMPT_CHARS, MAX_SEED, MAX_SIDE, Prompt

MAX_CALL_IMAGES = 64  # batch_size x n_iter

# Fields that have no effect here, each with the values that do nothing in the web UI either.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "disable_extra_networks": (False,),
    "hr_cfg": (),
    "hr_checkpoint_name": ("Use same checkpoint",),
    "hr_negative_prompt": (),
    "hr_prompt": (),
    "hr_sampler_name": ("Use same sampler",),
    "hr_scheduler": ("Use same scheduler",),
    "infotext": (),
    "initial_noise_multiplier": (1,),
    "restore_faces": (False,),
    "s_churn": (0,),
    "s_min_uncond": (0,),
    "s_noise": (1,),
    "s_tmax": (0,),
    "s_tmin": (0,),
    "save_images": (False,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "styles": ([],),
    "subseed_strength": (0,),
    "tiling": (False,),
}
# As NEUTRAL, for a unit of ControlNet.
NEUTRAL_IN_UNIT: dict[str, tuple[Any, ...]] = {
    "advanced_weighting": (),
    "control_mode": ("Balanced", 0),
    "effective_region_mask": (),
    "guidance": (1,),
    "hr_option": ("Both", "HiResFixOption.BOTH", 0),
    "inpaint_crop_input_image": (True,),
    "ipadapter_input": (),
    "mask": (),
    "mask_image": (),
}


def _whole(value: Any) -> Any:
    """Clients divide pixels by ratios: a fraction is cut off."""
    if isinstance(value, float) and math.isfinite(value):
        return int(value)
    return value


def _present(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if value is not None and value != ""}


CUT = BeforeValidator(_whole)  # after the bounds, else pydantic does not put them into the schema
Whole = Annotated[int, CUT]
Natural = Annotated[int, Field(ge=0), CUT]
Steps = Annotated[int, Field(ge=1), CUT]
Seed = Annotated[int, Field(le=MAX_SEED), CUT]
Count = Annotated[int, Field(ge=1, le=MAX_CALL_IMAGES), CUT]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE), CUT]
Pixels = Annotated[int, Field(ge=0, le=MAX_SIDE), CUT]
Layers = Annotated[int, Field(ge=-1, le=MAX_CLIP_SKIP + 1), CUT]
ResizeMode = Annotated[int, Field(ge=0, le=3), CUT]
Real = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=500)]


class Lenient(BaseModel):
    """null and "" are as good as no field at all; what is not declared is kept in `model_extra`."""

    model_config = ConfigDict(
        extra="allow", protected_namespaces=(), json_schema_extra=empty_counts_as_absent
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, values: Any) -> Any:
        return _present(values)

    @property
    def undeclared(self) -> dict[str, Any]:
        return self.model_extra or {}


class OverrideSettings(Lenient):
    """Settings of the web UI, for one call."""

    sd_model_checkpoint: Name | None = Field(None, description="Model: its title or its name")
    CLIP_stop_at_last_layers: Layers | None = Field(
        None, description="The layer of the text encoder to stop at, 1 being the last"
    )

    token_merging_ratio: Share = Field(0.0, description="More than 0.75 become 0.75")


class Script(Lenient):
    """The arguments of a script that runs along."""

    args: list[Any] = []


Scripts = Annotated[dict[str, Script], BeforeValidator(_present)]


class Processing(Lenient):
    """What txt2img and img2img have in common."""

    prompt: Prompt = Field("", description="What to draw; `<lora:name:weight>` works")
    negative_prompt: Prompt = Field("", description="What to keep out of the image")
    seed: Seed = Field(-1, description="Of the first image, then seed + 1, ...; below 0: drawn")
    subseed: Whole = -1
    sampler_name: Name | None = Field(None, description='"DPM++ 2M", also "DPM++ 2M Karras"')
    sampler_index: Name = Field("Euler", description="As `sampler_name`, which goes first")
    scheduler: Name = Field("automatic", description="Noise schedule, by name or label")
    steps: Steps = Field(50, description="More than 150 become 150")
    cfg_scale: Annotated[Real, Field(ge=0, le=50)] = 7.0
    width: Side = Field(512, description="Rounded to a multiple of 8")
    height: Side = Field(512, description="Rounded to a multiple of 8")
    batch_size: Count = 1
    n_iter: Count = Field(
        1, description=f"batch_size x n_iter images are made, at most {MAX_CALL_IMAGES}"
    )
    denoising_strength: Share = 0.75
    eta: Real | None = None
    clip_skip: Layers | None = Field(None, description="As override_settings has it")
    model: Name | None = Field(None, description="As override_settings.sd_model_checkpoint")
    refiner_checkpoint: Name | None = None
    refiner_switch_at: Share | None = None
    override_settings: OverrideSettings = OverrideSettings()
    override_settings_restore_afterwards: bool = True
    script_name: Name | None = Field(None, description="There are none: 422")
    alwayson_scripts: Scripts = Field({}, description="ControlNet is the one there is")
    send_images: bool = True


class Txt2Img(Processing):
    """The body of POST /sdapi/v1/txt2img. null and "" count as absent, and numbers may be text."""

    enable_hr: bool = Field(False, description="Draw small, enlarge, draw again")
    hr_scale: Annotated[Real, Field(ge=0, le=8)] = 2.0
    hr_upscaler: Name = "Latent"
    hr_second_pass_steps: Natural = Field(0, description="0: as `steps`")
    hr_resize_x: Pixels = 0
    hr_resize_y: Pixels = 0
    firstphase_width: Pixels = Field(0, description="Of the first pass, in place of `width`")
    firstphase_height: Pixels = 0


class Img2Img(Processing):
    """The body of POST /sdapi/v1/img2img. null and "" count as absent, and numbers may be text."""

    init_images: list[str] | None = Field(
        None, description="Base64 or data URI; the first is what the image starts from"
    )
    include_init_images: bool = False
    resize_mode: ResizeMode = Field(0, description="0 stretch, 1 crop, 2 fit")
    mask: str | None = Field(None, description="White: repaint; base64 or data URI")
    mask_blur: Natural | None = None
    mask_blur_x: Natural = 4
    mask_blur_y: Natural = 4
    inpainting_fill: Whole = Field(0, description="1, the original content, is what is done")
    inpaint_full_res: bool = Field(True, description="Repaint the masked region alone, enlarged")
    inpaint_full_res_padding: Pixels = Field(0, description="Pixels around the masked region")
    inpainting_mask_invert: bool = Field(False, description="Repaint what is black")


class Unit(Lenient):
    """One unit of the ControlNet extension."""

    enabled: bool = True
    image: str | dict[str, Any] | None = None
    input_image: str | dict[str, Any] | None = None
    module: Name = "none"
    preprocessor: Name | None = None
    model: Name = "None"
    weight: Annotated[Real, Field(ge=0, le=10)] = 1.0
    guidance_start: Share = 0.0
    guidance_end: Share = 1.0
    resize_mode: int | str = "Crop and Resize"
    processor_res: Real = -1
    threshold_a: Real = -1
    threshold_b: Real = -1
    pixel_perfect: bool = False


def without_images(value: Any, depth: int = 8) -> Any:
    """A value out of a body as an answer may repeat it: no images, nothing that JSON lacks."""
    match value:
        case dict() if depth:
            return {str(key): without_images(item, depth - 1) for key, item in value.items()}
        case list() if depth:
            return [without_images(item, depth - 1) for item in value]
        case str() if len(value) <= MAX_PROMPT_CHARS:
            return value
        case bool() | int():
            return value
        case float() if math.isfinite(value):
            return value
    return None
