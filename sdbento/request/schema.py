"""The requests and answers of every door, typed and bounded. Knows neither HTTP nor torch.

Unknown fields are refused, so that a misspelt parameter is an error and not silence. What a model
decides (size, steps, guidance, sampler) is None here and filled in by `settle`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
)

from sdbento.catalog.families import VAE_FACTOR

MAX_PROMPT_CHARS = 10_000
MAX_STEPS = 150
MAX_IMAGES = 16
MIN_SIDE, MAX_SIDE = 64, 4096  # pixels
MAX_SEED = 2**63 - 1
MAX_TIMEOUT = 3600
MAX_CONTROLNETS = 8
MAX_LORAS = 32  # of one request
MAX_CLIP_SKIP = 12
MAX_WEIGHT = 10.0
MAX_DEEP_CACHE_INTERVAL = 10
MAX_TOKEN_MERGING_RATIO = 0.75  # one token of every four stays
MAX_IMAGE_CHARS = 64 * 1024 * 1024  # the settings' own limits are in bytes, and lower

Prompt = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=500)]
Side = Annotated[int, Field(ge=MIN_SIDE, le=MAX_SIDE, multiple_of=VAE_FACTOR)]
Length = Annotated[int, Field(ge=0, le=MAX_SIDE)]
Size = Annotated[
    tuple[Length, Length],
    WithJsonSchema(  # a tuple's own schema has `prefixItems`, which few readers of schemas know
        {"type": "array", "minItems": 2, "maxItems": 2}
        | {"items": {"type": "integer", "minimum": 0, "maximum": MAX_SIDE}}
    ),
]
Scale = Annotated[float, Field(ge=0, le=50, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
OutputFormat = Literal["png", "jpeg", "webp"]
ImageSource = Annotated[str, StringConstraints(min_length=1, max_length=MAX_IMAGE_CHARS)]
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Enlargement = Annotated[float, Field(gt=1, le=8, allow_inf_nan=False)]
Upscaler = Literal["lanczos", "bicubic", "nearest"]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) or value is None else [value]


def floor_side(side: float) -> int:
    """A length in pixels as a `Side` can be."""
    return max(MIN_SIDE, int(side) // VAE_FACTOR * VAE_FACTOR)


def nearest_side(side: float) -> int:
    """The nearest such length; of two that are as near, the larger."""
    return floor_side(side + VAE_FACTOR / 2)


class _Strict(BaseModel):
    """No unknown fields, no guessing of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class ControlNetInput(_Strict):
    """One ControlNet and the image that steers it (Zhang et al. 2023)."""

    type: Name = Field(
        description="canny, depth, openpose, scribble, softedge, lineart, mlsd, normal, seg, "
        "tile or inpaint; or a Hub id or folder of a ControlNet"
    )
    image: ImageSource | None = Field(
        None, description="https URL, data URI or base64; absent: the request's `image`"
    )
    conditioning_scale: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = Field(
        1.0, description="How strongly it steers the image"
    )
    guidance_start: Fraction = Field(0.0, description="Share of the steps after which it begins")
    guidance_end: Fraction = Field(1.0, description="Share of the steps after which it stops")
    preprocess: bool = Field(
        False, description="Make the control image (edges, depth, ...) out of an ordinary image"
    )


class LoraInput(_Strict):
    """One LoRA (Hu et al. 2021)."""

    model_id: Name = Field(
        description="Name in the LoRA folder or catalogue; Hub id or https URL where allowed"
    )
    weight: Weight = Field(1.0, description="How strongly it changes the image; 0: not at all")
    text_encoder_weight: Weight | None = Field(
        None, description="Weight of its text-encoder part; absent: `weight`"
    )


class Outpaint(_Strict):
    """Pixels to add on each side of `image`."""

    left: Length = Field(0, description="Pixels to add on the left of `image`")
    right: Length = Field(0, description="Pixels to add on its right")
    top: Length = Field(0, description="Pixels to add above it")
    bottom: Length = Field(0, description="Pixels to add below it")


class Refiner(_Strict):
    """The SDXL refiner takes over for the last steps ("ensemble of expert denoisers")."""

    model: Name = Field(
        "stabilityai/stable-diffusion-xl-refiner-1.0", description="Model name or id"
    )
    switch_at: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.8, description="Share of the denoising that the first model does before the refiner"
    )
    aesthetic_score: Annotated[float, Field(ge=0, le=10)] = Field(
        6.0,
        description="How beautiful the image should be, as the refiner's training images were "
        "scored",
    )
    negative_aesthetic_score: Annotated[float, Field(ge=0, le=10)] = Field(
        2.5, description="The score that guidance leads away from, as from the negative prompt"
    )


class Upscale(_Strict):
    """Enlarge `image` and denoise it again, so that detail comes in."""

    scale: Enlargement = Field(2.0, description="Factor for the width and height of `image`")
    strength: Annotated[float, Field(gt=0, le=1)] = Field(
        0.35, description="Share of the steps that are done on the enlarged image"
    )
    upscaler: Upscaler = Field("lanczos", description="Filter that enlarges it")


class Hires(_Strict):
    """Draw small, enlarge, and denoise again at the larger size."""

    scale: Enlargement = Field(2.0, description="Factor for `width` and `height`")
    steps: Steps | None = Field(
        None, description="num_inference_steps of the second pass; absent: as in the first"
    )
    strength: Annotated[float, Field(gt=0, le=1)] = Field(
        0.6, description="Share of these steps that are done"
    )
    upscaler: Literal["lanczos", "bicubic", "nearest", "latent"] = Field(
        "lanczos",
        description="Filter that enlarges the image; latent: enlarges the latents (bilinear)",
    )


class GenerateRequest(_Strict):
    """One request; every field but `prompt` has a default.

    With `image` it is image to image, with `mask_image` or `outpaint` inpainting; `controlnet` and
    `lora` combine with each. `hires`, `refiner` and `upscale` exclude one another and inpainting;
    `upscale` sets size and strength itself.
    """

    prompt: Prompt = Field(description="What to draw")
    negative_prompt: Prompt | None = Field(None, description="What to keep out of the image")
    prompt_2: Prompt | None = Field(
        None, description="SDXL: prompt for its second text encoder; absent: `prompt`"
    )
    negative_prompt_2: Prompt | None = Field(
        None,
        description="SDXL: negative prompt for its second text encoder; absent: `negative_prompt`",
    )
    clip_skip: Annotated[int, Field(ge=1, le=MAX_CLIP_SKIP)] | None = Field(
        None, description="Layers of the text encoder to leave out at the end, as diffusers counts"
    )
    model: Name | None = Field(None, description="Model name or id; absent: the default model")
    image: ImageSource | None = Field(
        None, description="Image to start from: https URL, data URI or base64"
    )
    strength: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="How far to go from `image`: the share of the steps that are done; absent: "
        "0.8, with a mask 1.0",
    )
    mask_image: ImageSource | None = Field(
        None,
        description="Mask: its white parts say where to repaint `image`; https URL, data "
        "URI or base64",
    )
    mask_blur: Annotated[int, Field(ge=0, le=128)] | None = Field(
        None,
        description="Pixels over which the mask's edge is blurred; outside of it the original is "
        "put back. Absent or 0: all pixels come from the model; with `outpaint`: 8",
    )
    padding_mask_crop: Annotated[int, Field(ge=0, le=MAX_SIDE)] | None = Field(
        None,
        description="Repaint only the masked region and this many pixels around it, enlarged to "
        "`width` x `height`, and put the result back into the original",
    )
    outpaint: Outpaint | None = Field(None, description="Pixels to add around `image`")
    resize_mode: Literal["stretch", "crop", "fit"] = Field(
        "stretch",
        description="How an image of another shape becomes `width` x `height`: stretched; cropped; "
        "or fitted in, with the margins filled",
    )
    width: Side | None = Field(
        None,
        description="Width in pixels, a multiple of 8; absent: that of `image`, else of the "
        "control image, else the model's native size",
    )
    height: Side | None = Field(None, description="Height in pixels, likewise")
    controlnet: (
        Annotated[
            list[ControlNetInput],
            Field(max_length=MAX_CONTROLNETS),
            BeforeValidator(
                _as_list, json_schema_input_type=ControlNetInput | list[ControlNetInput]
            ),
        ]
        | None
    ) = Field(None, description="One ControlNet or a list of them")
    lora: (
        Annotated[
            list[LoraInput],
            Field(max_length=MAX_LORAS),
            BeforeValidator(_as_list, json_schema_input_type=LoraInput | list[LoraInput]),
        ]
        | None
    ) = Field(None, description="One LoRA or a list; or write `<lora:name:weight>` in the prompt")
    refiner: Refiner | None = Field(None, description="SDXL: the refiner does the last steps")
    hires: Hires | None = Field(None, description="A second pass at a larger size")
    upscale: Upscale | None = Field(None, description="Enlarge `image` with new detail")
    num_inference_steps: Steps | None = Field(
        None, description="Denoising steps; absent: the model's default"
    )
    guidance_scale: Scale | None = Field(
        None,
        description="How strongly the image follows the prompt (classifier-free guidance); 1 or "
        "less: no guidance, at half the cost; absent: the model's default",
    )
    guidance_rescale: Fraction = Field(
        0.0,
        description="How far guidance is scaled back so that it does not overexpose the image "
        "(section 3.4 of Lin et al. 2023); 0: not at all",
    )
    guidance_start: Fraction = Field(
        0.0, description="Share of the steps before guidance begins; steps without it cost half"
    )
    guidance_end: Fraction = Field(1.0, description="Share of the steps after which guidance stops")
    deep_cache_interval: Annotated[int, Field(ge=1, le=MAX_DEEP_CACHE_INTERVAL)] = Field(
        1,
        description="DeepCache (Ma et al. 2023): compute the whole UNet only in every n-th step, "
        "and its outermost blocks in the others; 1: the whole UNet in every step",
    )
    token_merging_ratio: Annotated[
        float, Field(ge=0, le=MAX_TOKEN_MERGING_RATIO, allow_inf_nan=False)
    ] = Field(
        0.0,
        description="Token merging (Bolya & Hoffman 2023): share of the tokens that the largest "
        "self-attention layers merge into others; 0: none",
    )
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] | None = Field(
        None,
        description="Seed of the first image, then seed + 1, ...; absent or -1: random",
    )
    num_images: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = Field(
        1, description="Number of images"
    )
    scheduler: Name | None = Field(
        None, description='Sampler, e.g. "DPM++ 2M Karras"; GET /samplers lists them'
    )
    sigmas: Literal["normal", "karras", "exponential", "beta"] | None = Field(
        None, description="Noise schedule, if the sampler has it; absent: the model's own"
    )
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = Field(
        None,
        description="How the sampler spaces its timesteps; absent: the model's own",
    )
    eta: Fraction = Field(0.0, description="Noise of DDIM and TCD; other samplers ignore it")
    output_format: OutputFormat = Field("png", description="Format of the images")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of JPEG and WebP; absent: 95"
    )
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT, allow_inf_nan=False)] | None = Field(
        None,
        description="Seconds after which the server gives the request up, at most "
        "SDBENTO_MAX_TIMEOUT",
    )
    preview_every: Annotated[int, Field(ge=0, le=MAX_STEPS)] = Field(
        0,
        description="In /generate_stream: send a small preview every n steps; 0: none",
    )
    original_size: Size | None = Field(
        None,
        description="SDXL: [height, width] that the image should seem to have had before it was "
        "resized; absent: its own",
    )
    crops_coords_top_left: Size = Field(
        (0, 0),
        description="SDXL: [top, left] of the part to which the image should seem to be cropped",
    )
    target_size: Size | None = Field(
        None,
        description="SDXL: [height, width] that the image should seem to have; absent: its own",
    )
    negative_original_size: Size | None = Field(
        None, description="SDXL: `original_size` for the negative prompt; absent: the same"
    )
    negative_crops_coords_top_left: Size = Field(
        (0, 0), description="SDXL: `crops_coords_top_left` for the negative prompt"
    )
    negative_target_size: Size | None = Field(
        None, description="SDXL: `target_size` for the negative prompt; absent: the same"
    )


class ImageRequest(GenerateRequest):
    """A request with an `image`."""

    image: ImageSource = Field(description="Image to start from")


class MaskedRequest(ImageRequest):
    """A request with an `image` and a `mask_image`."""

    mask_image: ImageSource = Field(description="Where to repaint `image`: the white parts")


class Timings(BaseModel):
    """Seconds spent waiting, denoising, decoding, and in all."""

    queued: float
    denoising: float
    decoding: float
    total: float


class GenerateResponse(BaseModel):
    """The images of one request and everything needed to make them again."""

    model_config = ConfigDict(protected_namespaces=())

    images: list[str] = Field(description="Base64 of the encoded images")
    seeds: list[int] = Field(description="The seed of each image")
    infotexts: list[str] = Field(
        description="How each image was made, as AUTOMATIC1111's web UI writes it"
    )
    model: str
    parameters: dict[str, Any] = Field(description="All parameters as they were used")
    timings: Timings
    warnings: list[str] = Field(default_factory=list)


PARTS: dict[str, type[BaseModel]] = {
    "controlnet": ControlNetInput,
    "lora": LoraInput,
    "outpaint": Outpaint,
    "refiner": Refiner,
    "hires": Hires,
    "upscale": Upscale,
}
