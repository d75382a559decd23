"""Fields of requests, and the messages for those that are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdbento.errors import InvalidParameter, MalformedRequest, SDBentoError
from sdbento.request.parse import ELSEWHERE, parse
from sdbento.request.result import describe
from sdbento.request.schema import (
    MAX_CLIP_SKIP,
    MAX_IMAGES,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    MAX_TIMEOUT,
    MAX_WEIGHT,
    GenerateRequest,
    ImageRequest,
    MaskedRequest,
)


def request(**fields: Any) -> GenerateRequest:
    return parse(json.dumps({"prompt": "a cat", **fields}))


def refusal(**fields: Any) -> InvalidParameter:
    with pytest.raises(InvalidParameter) as caught:
        request(**fields)
    error = caught.value
    assert error.status == 422
    assert "\n" not in error.message
    return error


def malformed(body: str | bytes) -> str:
    with pytest.raises(MalformedRequest) as caught:
        parse(body)
    assert caught.value.status == 400
    return caught.value.message


def test_a_prompt_is_enough() -> None:
    assert request() == GenerateRequest(prompt="a cat")


def test_fields_that_the_model_decides_are_left_open() -> None:
    open_fields = ["model", "width", "height", "num_inference_steps", "guidance_scale", "scheduler"]
    assert {getattr(request(), field) for field in open_fields} == {None}


def test_the_request_of_the_runpod_example_is_accepted() -> None:
    made = request(
        negative_prompt="ugly, deformed, bad anatomy, blurry",
        num_inference_steps=30,
        guidance_scale=7.5,
        width=1024,
        height=1024,
        seed=42,
    )
    assert (made.num_inference_steps, made.guidance_scale, made.seed) == (30, 7.5, 42)


# (field, a value just inside, the value just outside, what the message says of the limit)
BOUNDS: list[tuple[str, Any, Any, str]] = [
    ("width", 64, 56, "greater than or equal to 64"),
    ("width", MAX_SIDE, MAX_SIDE + 8, f"less than or equal to {MAX_SIDE}"),
    ("width", 512, 513, "a multiple of 8"),
    ("height", 64, 56, "greater than or equal to 64"),
    ("height", MAX_SIDE, MAX_SIDE + 8, f"less than or equal to {MAX_SIDE}"),
    ("height", 520, 521, "a multiple of 8"),
    ("num_inference_steps", 1, 0, "greater than or equal to 1"),
    ("num_inference_steps", MAX_STEPS, MAX_STEPS + 1, f"less than or equal to {MAX_STEPS}"),
    ("guidance_scale", 0, -0.1, "greater than or equal to 0"),
    ("guidance_scale", 50, 50.1, "less than or equal to 50"),
    ("guidance_scale", 7, float("nan"), "a finite number"),
    ("guidance_rescale", 1, 1.1, "less than or equal to 1"),
    ("guidance_rescale", 0, -1, "greater than or equal to 0"),
    ("seed", -1, -2, "greater than or equal to -1"),
    ("seed", MAX_SEED, MAX_SEED + 1, f"less than or equal to {MAX_SEED}"),
    ("num_images", 1, 0, "greater than or equal to 1"),
    ("num_images", MAX_IMAGES, MAX_IMAGES + 1, f"less than or equal to {MAX_IMAGES}"),
    ("eta", 0, -0.5, "greater than or equal to 0"),
    ("eta", 1, 1.5, "less than or equal to 1"),
    ("output_compression", 0, -1, "greater than or equal to 0"),
    ("output_compression", 100, 101, "less than or equal to 100"),
    ("timeout", 0.1, 0, "greater than 0"),
    ("timeout", MAX_TIMEOUT, MAX_TIMEOUT + 1, f"less than or equal to {MAX_TIMEOUT}"),
    ("timeout", 1, float("inf"), "a finite number"),
    ("preview_every", 0, -1, "greater than or equal to 0"),
    ("preview_every", MAX_STEPS, MAX_STEPS + 1, f"less than or equal to {MAX_STEPS}"),
    ("prompt", "p" * MAX_PROMPT_CHARS, "p" * (MAX_PROMPT_CHARS + 1), f"at most {MAX_PROMPT_CHARS}"),
    ("negative_prompt", "", "p" * (MAX_PROMPT_CHARS + 1), f"at most {MAX_PROMPT_CHARS}"),
    ("model", "shapes", "", "at least 1 character"),
    ("scheduler", "DDIM", "s" * 501, "at most 500"),
    ("sigmas", "karras", "cubic", "'normal', 'karras', 'exponential' or 'beta'"),
    ("timestep_spacing", "trailing", "random", "'leading', 'trailing' or 'linspace'"),
    ("output_format", "webp", "gif", "'png', 'jpeg' or 'webp'"),
    ("prompt_2", "", "p" * (MAX_PROMPT_CHARS + 1), f"at most {MAX_PROMPT_CHARS}"),
    ("negative_prompt_2", "", "p" * (MAX_PROMPT_CHARS + 1), f"at most {MAX_PROMPT_CHARS}"),
    ("clip_skip", 1, 0, "greater than or equal to 1"),
    ("clip_skip", MAX_CLIP_SKIP, MAX_CLIP_SKIP + 1, f"less than or equal to {MAX_CLIP_SKIP}"),
    ("image", "https://pictures.example/a.png", "", "at least 1 character"),
    ("mask_image", "https://pictures.example/a.png", "", "at least 1 character"),
    ("strength", 0.01, 0, "greater than 0"),
    ("strength", 1, 1.01, "less than or equal to 1"),
    ("mask_blur", 0, -1, "greater than or equal to 0"),
    ("mask_blur", 128, 129, "less than or equal to 128"),
    ("padding_mask_crop", 0, -1, "greater than or equal to 0"),
    ("padding_mask_crop", MAX_SIDE, MAX_SIDE + 1, f"less than or equal to {MAX_SIDE}"),
    ("resize_mode", "fit", "zoom", "'stretch', 'crop' or 'fit'"),
    ("guidance_start", 1, 1.1, "less than or equal to 1"),
    ("guidance_end", 0, -0.1, "greater than or equal to 0"),
    ("deep_cache_interval", 1, 0, "greater than or equal to 1"),
    ("deep_cache_interval", 10, 11, "less than or equal to 10"),
    ("token_merging_ratio", 0, -0.1, "greater than or equal to 0"),
    ("token_merging_ratio", 0.75, 0.8, "less than or equal to 0.75"),
]

# (field, a part of it, a value just inside, the value just outside, what the message says)
PARTS: list[tuple[str, str, Any, Any, str]] = [
    ("controlnet", "type", "canny", "", "at least 1 character"),
    ("controlnet", "conditioning_scale", 10, 10.1, "less than or equal to 10"),
    ("controlnet", "guidance_start", 0, -0.1, "greater than or equal to 0"),
    ("controlnet", "guidance_end", 1, 1.1, "less than or equal to 1"),
    ("controlnet", "preprocess", True, "yes", "a valid boolean"),
    ("lora", "model_id", "outline", "", "at least 1 character"),
    ("lora", "weight", -MAX_WEIGHT, -MAX_WEIGHT - 1, "greater than or equal to -10"),
    ("lora", "text_encoder_weight", MAX_WEIGHT, 1e9, "less than or equal to 10"),
    ("outpaint", "left", 0, -1, "greater than or equal to 0"),
    ("outpaint", "bottom", MAX_SIDE, MAX_SIDE + 1, f"less than or equal to {MAX_SIDE}"),
    ("refiner", "switch_at", 0.5, 1.0, "less than 1"),
    ("refiner", "aesthetic_score", 10, 11, "less than or equal to 10"),
    ("hires", "scale", 2, 1, "greater than 1"),
    ("hires", "strength", 1, 1.1, "less than or equal to 1"),
    ("hires", "steps", MAX_STEPS, 0, "greater than or equal to 1"),
    ("hires", "upscaler", "latent", "esrgan", "'latent'"),
    ("upscale", "scale", 8, 8.5, "less than or equal to 8"),
    ("upscale", "upscaler", "nearest", "latent", "'nearest'"),
]


@pytest.mark.parametrize(("field", "inside", "outside", "limit"), BOUNDS)
def test_a_field_out_of_bounds_is_named_with_limit_and_value(
    field: str, inside: Any, outside: Any, limit: str
) -> None:
    assert getattr(request(**{field: inside}), field) == inside
    error = refusal(**{field: outside})
    assert error.param == field
    assert error.message.startswith(f"{field} ")
    assert limit in error.message
    assert repr(outside)[:40] in error.message
    assert len(error.message) < 250


@pytest.mark.parametrize(("field", "part", "inside", "outside", "limit"), PARTS)
def test_a_nested_field_out_of_bounds_is_named_with_its_place(
    field: str, part: str, inside: Any, outside: Any, limit: str
) -> None:
    needed = {"controlnet": {"type": "canny"}, "lora": {"model_id": "outline"}}.get(field, {})
    made = getattr(request(**{field: {**needed, part: inside}}), field)
    [made] = made if isinstance(made, list) else [made]
    assert getattr(made, part) == inside
    error = refusal(**{field: {**needed, part: outside}})
    place = f"{field}.0.{part}" if field in ("controlnet", "lora") else f"{field}.{part}"
    assert error.message.startswith(f"{place} ")
    assert error.param == place
    assert limit in error.message


@pytest.mark.parametrize("field", ["controlnet", "lora"])
def test_a_single_item_means_a_list_of_one(field: str) -> None:
    one = {"type": "canny"} if field == "controlnet" else {"model_id": "outline"}
    assert getattr(request(**{field: one}), field) == getattr(request(**{field: [one]}), field)
    assert getattr(request(**{field: []}), field) == []
    assert refusal(**{field: [one] * 40}).param == field
    assert "should be an object" in refusal(**{field: "canny"}).message


def test_an_unknown_nested_field_is_refused_with_the_known_ones() -> None:
    error = refusal(controlnet={"type": "canny", "scale": 1.0})
    assert "controlnet.0.scale is not a known field; known: type, image," in error.message


def test_the_description_of_a_request_holds_no_images() -> None:
    url, data = "https://pictures.example/a.png", "data:image/png;base64," + "A" * 1000
    described = describe(
        request(image=data, mask_image=url, controlnet={"type": "canny", "image": data})
    )
    assert described["mask_image"] == url
    assert described["image"] == described["controlnet"][0]["image"]
    assert described["image"].startswith("sha256:") and len(described["image"]) == 71


@pytest.mark.parametrize(
    ("model", "missing"), [(ImageRequest, "image"), (MaskedRequest, "mask_image")]
)
def test_routes_for_images_require_them(model: type[GenerateRequest], missing: str) -> None:
    given = {"prompt": "p", "image": "A", "mask_image": "A"}
    assert parse(json.dumps(given), model).prompt == "p"
    del given[missing]
    with pytest.raises(InvalidParameter, match=f"{missing} is required"):
        parse(json.dumps(given), model)


SIZES = [
    "original_size",
    "crops_coords_top_left",
    "target_size",
    "negative_original_size",
    "negative_crops_coords_top_left",
    "negative_target_size",
]


@pytest.mark.parametrize("field", SIZES)
def test_sizes_are_two_bounded_numbers(field: str) -> None:
    assert getattr(request(**{field: [0, MAX_SIDE]}), field) == (0, MAX_SIDE)
    assert refusal(**{field: [0, MAX_SIDE + 1]}).param == f"{field}.1"
    assert refusal(**{field: [-1, 0]}).param == f"{field}.0"
    assert refusal(**{field: [1]}).message == f"{field}.1 is required"
    assert refusal(**{field: [1, 2, 3]}).param == field
    assert refusal(**{field: "1x2"}).param == field


def test_every_field_with_a_limit_is_tried_above() -> None:
    tried = {field for field, *_ in BOUNDS} | {field for field, *_ in PARTS} | set(SIZES)
    assert tried == GenerateRequest.model_fields.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", "512"),
        ("width", 512.0),
        ("width", True),
        ("width", [512]),
        ("seed", "42"),
        ("seed", False),
        ("seed", 1.5),
        ("guidance_scale", "7.5"),
        ("guidance_scale", True),
        ("prompt", 123),
        ("prompt", None),
        ("prompt", ["a", "cat"]),
        ("negative_prompt", False),
        ("scheduler", 1),
        ("num_images", None),
    ],
)
def test_types_are_not_guessed(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert error.param == field
    assert error.message.endswith(f"; given: {value!r}")


def test_whole_numbers_are_accepted_as_floats() -> None:
    assert request(guidance_scale=7).guidance_scale == 7.0


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("num_inferense_steps", "did you mean num_inference_steps? Known"),
        ("steps", "it is called num_inference_steps here. Known"),
        ("zzz", "known"),
    ],
)
def test_an_unknown_field_is_refused_with_the_known_ones(field: str, meant: str) -> None:
    error = refusal(**{field: 5})
    assert error.param == field
    assert f"is not a known field; {meant}: prompt, negative_prompt, " in error.message


def test_every_foreign_field_name_maps_to_an_existing_field() -> None:
    assert set(ELSEWHERE.values()) <= set(GenerateRequest.model_fields)
    assert not ELSEWHERE.keys() & GenerateRequest.model_fields.keys()


def test_a_huge_unknown_field_is_not_echoed() -> None:
    error = refusal(**{"x" * 100_000: 1})
    assert len(error.message) < 1000
    assert len(error.param or "") < 100


def test_a_missing_prompt_is_named() -> None:
    with pytest.raises(InvalidParameter, match="prompt is required") as caught:
        parse("{}")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("body", ["[]", "null", "1", '"a cat"'])
def test_a_body_that_is_no_object_is_malformed(body: str) -> None:
    assert malformed(body) == "the body must be a JSON object"


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "prompt=a+cat",
        '{"prompt": "a cat",}',
        b'{"prompt": "\xff"}',
        b'\xff\xfe{"prompt": "a"}',
        '{"prompt": "\\ud800"}',  # half of a surrogate pair: no text that could be encoded
        '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"prompt": "a", "seed": ' + "9" * 10_000 + "}",
    ],
)
def test_a_body_that_is_no_json_is_malformed(body: str | bytes) -> None:
    message = malformed(body)
    assert message.startswith("the body is not JSON: ")
    assert len(message) < 200


def test_a_request_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        request().seed = 1  # type: ignore[misc]


def test_the_schema_describes_every_field() -> None:
    schema = GenerateRequest.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        assert [n for n, field in part["properties"].items() if "description" not in field] == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from([*GenerateRequest.model_fields, "x"]), json_values))
def test_whatever_is_sent_is_a_request_or_an_error_that_can_be_sent_back(
    fields: dict[str, Any],
) -> None:
    try:
        answer = parse(json.dumps(fields)).model_dump()
    except SDBentoError as error:
        answer = error.to_body()
    json.dumps(answer, ensure_ascii=False).encode()


@given(st.binary(max_size=50))
def test_whatever_bytes_are_sent_are_an_error_of_the_tree(body: bytes) -> None:
    with pytest.raises(SDBentoError):
        parse(body)
