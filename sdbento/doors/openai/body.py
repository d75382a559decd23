"""What clients ask for: OpenAI's fields, and beside them all that `/generate` takes.

Clients of compatible servers reach what OpenAI lacks by extra fields (`extra_body` of its SDKs),
under the names of many servers. So more is understood here than by `/generate`, and what nobody
understands is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    AliasGenerator,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from sdbento.doors.docs.bodies import empty_counts_as_absent
from sdbento.doors.http.forms import string_fields, text_as_json
from sdbento.request.parse import ELSEWHERE
from sdbento.request.schema import GenerateRequest, OutputFormat, Prompt

IMAGES = {"image", "mask_image"}  # what other servers call these, edits read in their own way
PROMPTS = {"prompt", "negative_prompt", "prompt_2", "negative_prompt_2"}  # may be empty


def _names(field: str) -> AliasChoices:
    """A field's names, the first of which is in the documents; of several that are given, the
    first counts."""
    others = [name for name, ours in ELSEWHERE.items() if ours == field and ours not in IMAGES]
    return AliasChoices(*others, field) if field == "num_images" else AliasChoices(field, *others)


def _word(value: Any) -> Any:
    """A word of a short list, whose case does not matter."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    return {"jpg": "jpeg"}.get(word, word)


Word = BeforeValidator(_word)
Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]


class ImageBody(GenerateRequest):
    """What to make. Beside OpenAI's fields, any field of `/generate` is understood.

    Fields that are null, or empty text where a prompt is not, count as absent. Numbers and objects
    may come as text.
    """

    model_config = ConfigDict(
        extra="ignore",
        strict=False,
        alias_generator=AliasGenerator(validation_alias=_names),
        json_schema_extra=empty_counts_as_absent,
    )

    size: str | None = Field(
        None,
        description="WIDTHxHEIGHT, rounded to multiples of 8 pixels; auto or absent: the model's "
        "own or, of an edit, that of `image`",
    )
    quality: Annotated[Quality, Word] | None = Field(
        None,
        description="Share of the model's own steps: low half, high and hd one and a half, xhigh "
        "and max twice, others all; ignored where `num_inference_steps` is given and by models "
        "of 8 steps or fewer",
    )
    output_format: Annotated[OutputFormat, Word] = Field("png", description="Format of the images")
    response_format: Annotated[Literal["url", "b64_json"], Word] | None = Field(
        None,
        description="absent: url if `model` begins with dall-e, else b64_json; streams have "
        "b64_json only",
    )
    background: Annotated[Literal["opaque", "auto", "transparent"], Word] | None = Field(
        None, description="transparent is refused: these models paint every pixel"
    )
    stream: bool = Field(False, description="Answer with server-sent events")
    partial_images: Annotated[int, Field(ge=0, le=3)] = Field(
        0, description="Previews of the first image that a stream sends on its way, at most"
    )
    input_fidelity: Annotated[Literal["high", "low"], Word] | None = Field(
        None, description="Edits without a mask: high: `strength` is 0.5"
    )
    style: Any = Field(None, description="Has no effect")
    moderation: Any = Field(None, description="Has no effect")
    user: Any = Field(None, description="Has no effect")

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {
            name: _parsed(name, value)
            for name, value in given.items()
            if value is not None and (value != "" or name in PROMPTS)
        }


class VariationBody(ImageBody):
    """What to make of an image, without a word on it."""

    prompt: Prompt = Field("", description="What to draw")


def _parsed(name: str, value: Any) -> Any:
    """An object or list that came as text, as in forms."""
    takes_json = name in GenerateRequest.model_fields and name not in string_fields()
    if takes_json and isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        return text_as_json(name, value)
    return value
