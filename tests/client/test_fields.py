"""Keyword arguments as requests: their types are the schema's, and images come in any form."""

from __future__ import annotations

import json
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Required, Union, get_args, get_origin, get_type_hints

import pytest
from PIL import Image
from pydantic import BaseModel

from sdbento.client import fields
from sdbento.client.fields import EditFields, Fields, ImageInput, as_request, image_source
from sdbento.errors import InvalidParameter, MalformedRequest, SDBentoError
from sdbento.jobs.runpod_format import Policy
from sdbento.request import parse, schema
from sdbento.request.schema import PARTS, GenerateRequest

TYPED_DICTS = {
    schema.ControlNetInput: fields.ControlNet,
    schema.LoraInput: fields.Lora,
    schema.Outpaint: fields.Outpaint,
    schema.Refiner: fields.Refiner,
    schema.Hires: fields.Hires,
    schema.Upscale: fields.Upscale,
}


def loose(annotation: Any) -> Any:
    """A type of the schema without its bounds, as a caller may give it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation == schema.ImageSource:
        return ImageInput
    if origin is Annotated:
        return loose(arguments[0])
    if origin in (Union, UnionType):
        return Union[tuple(map(loose, arguments))]  # noqa: UP007
    if origin is list:
        one = loose(arguments[0])
        return one | list[one]  # type: ignore[valid-type]
    if origin is tuple:
        return tuple[tuple(map(loose, arguments))]  # type: ignore[misc]
    return TYPED_DICTS.get(annotation, annotation)


def loose_types(model: type[BaseModel]) -> dict[str, Any]:
    hints = get_type_hints(model, include_extras=True)
    return {name: loose(hints[name]) for name in model.model_fields}


def test_the_arguments_are_the_fields_of_a_request() -> None:
    assert loose_types(GenerateRequest) == {"prompt": str, **get_type_hints(Fields)}


def test_an_edit_names_its_images_itself() -> None:
    own = {"image", "mask_image"}
    assert set(get_type_hints(EditFields)) == set(get_type_hints(Fields)) - own


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_has_the_types_of_the_schema(part: Any) -> None:
    typed = TYPED_DICTS[part]
    assert loose_types(part) == get_type_hints(typed)
    required = {name for name, field in part.model_fields.items() if field.is_required()}
    extras = get_type_hints(typed, include_extras=True)
    assert {name for name, hint in extras.items() if get_origin(hint) is Required} == required


def test_a_policy_has_the_names_of_the_job_api() -> None:
    aliases = {field.alias or name for name, field in Policy.model_fields.items()}
    assert get_type_hints(fields.Policy).keys() == aliases


WRONG: list[dict[str, Any]] = [
    {"stepz": 5},
    {"steps": 5},
    {"width": 513},
    {"seed": 2**63},
    {"guidance_scale": float("nan")},
    {"num_images": None},
    {"controlnet": [{"type": "canny", "imag": "x"}]},
    {"controlnet": "canny"},
    {"controlnet": 5},
    {"lora": [{}] * 33},
    {"image": ""},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_request_is_refused_in_the_words_of_the_server(wrong: dict[str, Any]) -> None:
    with pytest.raises(SDBentoError) as theirs:
        parse.parse(json.dumps({"prompt": "x", **wrong}))
    with pytest.raises(type(theirs.value)) as ours:
        as_request("x", wrong)
    assert (ours.value.message, ours.value.param) == (theirs.value.message, theirs.value.param)


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="prompt should be a valid string"):
        as_request(None, {})  # type: ignore[arg-type]
    with pytest.raises(MalformedRequest, match="the request is not JSON"):
        as_request("\ud800", {})


def test_sizes_may_be_tuples() -> None:
    request = as_request("x", {"original_size": (512, 256)})
    assert json.loads(json.dumps(request))["original_size"] == [512, 256]


def picture(mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (3, 2), 7)


def png() -> bytes:
    buffer = BytesIO()
    picture().save(buffer, "PNG")
    return buffer.getvalue()


def test_images_may_be_given_as_bytes_files_and_paths(tmp_path: Path) -> None:
    path = tmp_path / "in.png"
    path.write_bytes(png())
    with path.open("rb") as file:
        for image in (png(), path, file, BytesIO(png())):
            assert b64decode(image_source(image, "image")) == png()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK", "HSV", "F"])
def test_pil_images_of_every_mode_are_sent_as_png(mode: str) -> None:
    sent = Image.open(BytesIO(b64decode(image_source(picture(mode), "image"))))
    assert (sent.format, sent.size) == ("PNG", (3, 2))


def test_a_photo_that_lies_on_its_side_is_sent_upright() -> None:
    """The server turns the file as well: path and PIL image make the same request."""
    photo = picture()
    photo.getexif()[0x0112] = 6
    sent = Image.open(BytesIO(b64decode(image_source(photo, "image"))))
    assert sent.size == (2, 3)
    assert 0x0112 not in sent.getexif()


@pytest.mark.parametrize(
    "text", ["https://example.com/a.png", "data:image/png;base64,AA==", "AA=="]
)
def test_text_is_sent_as_it_is(text: str) -> None:
    assert image_source(text, "image") == text


def test_the_name_of_a_file_is_no_image() -> None:
    with pytest.raises(InvalidParameter, match=r"pathlib.Path; given: 'in.png'") as refused:
        as_request("x", {"mask_image": "in.png"})
    assert refused.value.param == "mask_image"


def test_other_objects_are_no_images() -> None:
    with pytest.raises(TypeError, match="image cannot be made of int"):
        image_source(5, "image")  # type: ignore[arg-type]


def test_images_of_controlnets_are_sent_too() -> None:
    one = as_request("x", {"controlnet": {"type": "canny", "image": png()}})["controlnet"]
    [first] = as_request("x", {"controlnet": [{"type": "canny", "image": picture()}]})["controlnet"]
    for net in (one, first):
        assert Image.open(BytesIO(b64decode(net["image"]))).size == (3, 2)


def test_the_callers_own_fields_stay_as_they_are() -> None:
    given = {"image": picture(), "controlnet": [{"type": "canny", "image": png()}]}
    kept = {**given, "controlnet": [dict(net) for net in given["controlnet"]]}  # type: ignore[attr-defined]
    as_request("x", given)
    assert given == kept
