"""The requests and answers of every door, typed and bounded. Knows neither HTTP nor torch.

Unknown fields are refused, so that a misspelt parameter is an error and not silence. What a model
decides (size, steps, guidance, sampler) is None here and filled in by `intake`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)

from sdbento.errors import InvalidParameter, MalformedRequest, SDBentoError

MAX_PROMPT_CHARS = 10_000
MAX_STEPS = 150
MAX_IMAGES = 16
MAX_SIDE = 4096
MAX_SEED = 2**63 - 1
MAX_TIMEOUT = 3600

Prompt = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=500)]
Side = Annotated[int, Field(ge=64, le=MAX_SIDE, multiple_of=8)]
Length = Annotated[int, Field(ge=0, le=MAX_SIDE)]
Size = Annotated[
    tuple[Length, Length],
    WithJsonSchema(  # a tuple's own schema has no `items`, which BentoML's client reads
        {"type": "array", "minItems": 2, "maxItems": 2}
        | {"items": {"type": "integer", "minimum": 0, "maximum": MAX_SIDE}}
    ),
]
Scale = Annotated[float, Field(ge=0, le=50, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
OutputFormat = Literal["png", "jpeg", "webp"]


class GenerateRequest(BaseModel):
    """One text-to-image request; every field but `prompt` has a default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    prompt: Prompt = Field(description="What to draw")
    negative_prompt: Prompt | None = Field(None, description="What to keep out of the picture")
    model: Name | None = Field(None, description="Model name or id; the server's default if absent")
    width: Side | None = Field(
        None, description="Pixels, a multiple of 8; the model's own if absent"
    )
    height: Side | None = Field(
        None, description="Pixels, a multiple of 8; the model's own if absent"
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = Field(
        None, description="Denoising steps; the model's own if absent"
    )
    guidance_scale: Scale | None = Field(
        None, description="Classifier-free guidance; 1 or less: none, at half the cost"
    )
    guidance_rescale: Fraction = Field(0.0, description="Section 3.4 of Lin et al. 2023")
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] | None = Field(
        None,
        description="Seed of the first image, then seed + 1, ...; absent or -1: drawn",
    )
    num_images: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = Field(1, description="Images to make")
    scheduler: Name | None = Field(
        None, description='Sampler, e.g. "DPM++ 2M Karras"; GET /samplers lists them'
    )
    sigmas: Literal["normal", "karras", "exponential", "beta"] | None = Field(
        None, description="Noise schedule, where the sampler has it"
    )
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = Field(
        None,
        description="How the sampler spaces its timesteps; the model's own if absent",
    )
    eta: Fraction = Field(0.0, description="Noise of DDIM and TCD; other samplers ignore it")
    output_format: OutputFormat = Field("png", description="Format of the images")
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT, allow_inf_nan=False)] | None = Field(
        None, description="Seconds after which the request is given up"
    )
    preview_every: Annotated[int, Field(ge=0, le=MAX_STEPS)] = Field(
        0,
        description="Send a cheap preview every so many steps to /generate_stream; 0: none",
    )
    original_size: Size | None = Field(None, description="SDXL: [height, width] conditioning")
    crops_coords_top_left: Size = Field((0, 0), description="SDXL: [top, left] conditioning")
    target_size: Size | None = Field(None, description="SDXL: [height, width] conditioning")
    negative_original_size: Size | None = Field(None, description="SDXL, for the unguided rows")
    negative_crops_coords_top_left: Size = Field((0, 0), description="SDXL, the unguided rows")
    negative_target_size: Size | None = Field(None, description="SDXL, for the unguided rows")


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
    model: str
    parameters: dict[str, Any] = Field(description="All parameters as they were used")
    timings: Timings
    warnings: list[str] = Field(default_factory=list)


def parse(body: bytes | str) -> GenerateRequest:
    """A request from JSON text. Raises MalformedRequest or InvalidParameter."""
    try:
        return GenerateRequest.model_validate_json(body)
    except ValidationError as error:
        raise explain(error) from None


def explain(error: ValidationError) -> SDBentoError:
    """The first problem as one sentence that names field, limit and what was given."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return MalformedRequest(f"the body is not JSON: {first['ctx']['error']}")
    if not first["loc"]:
        return MalformedRequest("the body must be a JSON object")
    field = _shorten(".".join(str(part) for part in first["loc"]))
    match first["type"]:
        case "missing":
            return InvalidParameter(f"{field} is required", param=field)
        case "extra_forbidden":
            known = ", ".join(GenerateRequest.model_fields)
            return InvalidParameter(f"{field} is not a known field; known: {known}", param=field)
    problem = first["msg"].removeprefix("Input ")
    problem = problem[:1].lower() + problem[1:]
    return InvalidParameter(
        f"{field} {problem}; given: {_shorten(repr(first['input']))}", param=field
    )


def _shorten(text: str, limit: int = 80) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit - 20]}... ({len(text)} characters)"
