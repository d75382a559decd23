"""From OpenAI's fields to a request: sizes, steps, models, and the names of other servers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import ValidationError

from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import ModelSpec
from sdbento.doors.openai.body import ImageBody
from sdbento.doors.openai.order import Order, to_order
from sdbento.doors.openai.stream import preview_every
from sdbento.errors import (
    InvalidParameter,
    ModelLoadFailed,
    Overloaded,
    SDBentoError,
    UnknownModel,
)
from sdbento.request.schema import GenerateRequest
from sdbento.settings import Settings


def app(**options: Any) -> Any:
    """As much of an App as an order needs; it fails where the Hub would be asked."""
    settings = Settings.model_validate({"sd_model": "shapes", "allow_any_model": True, **options})
    catalog = Catalog(settings)

    async def find_model(name: str | None = None) -> ModelSpec:
        spec = catalog.known(name or settings.sd_model)
        assert spec is not None, f"the Hub is asked about {name}"
        return spec

    return SimpleNamespace(
        settings=settings,
        catalog=catalog,
        find_model=find_model,
    )


async def ordered(**fields: Any) -> Order:
    return await to_order(app(), ImageBody.model_validate({"prompt": "x"} | fields))


async def requested(**fields: Any) -> GenerateRequest:
    return (await ordered(**fields)).request


@pytest.mark.parametrize(
    ("size", "width", "height"),
    [
        (None, None, None),
        ("", None, None),
        (" AUTO ", None, None),
        ("512x768", 512, 768),
        ("512X768", 512, 768),
        (" 512 x 768\n", 512, 768),
        ("1×4096", 64, 4096),
        ("501x515", 504, 512),
        ("516x524", 520, 528),
    ],
)
async def test_a_size_becomes_sides_that_models_take(
    size: str | None, width: int | None, height: int | None
) -> None:
    request = await requested(size=size)
    assert (request.width, request.height) == (width, height)


@pytest.mark.parametrize(
    "size", ["big", "512", "512x", "x512", "0x512", "-8x8", "512x512x3", "4097x64", "1e3x64", "٣x٣"]
)
async def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(InvalidParameter, match="WIDTHxHEIGHT") as caught:
        await ordered(size=size)
    assert caught.value.param == "size"


async def test_rounding_is_told_and_an_exact_size_is_not() -> None:
    assert (await ordered(size="501x512")).warnings == ("size 501x512 was rounded to 504x512",)
    assert (await ordered(size="512x512")).warnings == ()


async def test_a_width_of_ours_counts_more_than_size() -> None:
    request = await requested(size="512x512", width=256)
    assert (request.width, request.height) == (256, 512)


@pytest.mark.parametrize(
    ("quality", "steps", "answered"),
    [
        (None, None, "medium"),
        ("auto", None, "medium"),
        ("standard", None, "medium"),
        ("medium", None, "medium"),
        ("low", 10, "low"),
        ("high", 30, "high"),
        ("HD", 30, "high"),
        ("xhigh", 40, "xhigh"),
        ("max", 40, "max"),
    ],
)
async def test_quality_is_a_share_of_the_models_steps(
    quality: str | None, steps: int | None, answered: str
) -> None:
    order = await ordered(quality=quality)
    assert order.request.num_inference_steps == steps
    assert order.quality == answered


async def test_quality_gives_way_to_steps_and_to_models_of_few_steps() -> None:
    order = await ordered(quality="low", steps=7)
    assert order.request.num_inference_steps == 7
    assert "quality has no effect" in order.warnings[0]
    order = await ordered(quality="low", model="sdxl-turbo")
    assert order.request.num_inference_steps is None
    assert "sdxl-turbo" in order.warnings[0]


@pytest.mark.parametrize(
    "model", ["dall-e-2", "gpt-image-1", "chatgpt-image-latest", "sd-cpp-local", "openai/dall-e-3"]
)
async def test_the_models_of_others_mean_the_default_one_and_the_hub_is_not_asked(
    model: str,
) -> None:
    order = await ordered(model=model)
    assert order.request.model is None
    assert order.spec.name == "shapes"
    assert order.warnings == (f"there is no model {model!r} here: shapes was used",)


async def test_models_of_ours_are_taken_by_any_of_their_names() -> None:
    for name in ("sd15", "SD15", "openai/sd15", "runwayml/stable-diffusion-v1-5"):
        order = await ordered(model=name)
        assert order.request.model == name.removeprefix("openai/")
        assert order.spec.name == "runwayml/stable-diffusion-v1-5"
        assert order.warnings == ()


@pytest.mark.parametrize(
    ("error", "offline", "replaced"),
    [
        (UnknownModel, False, True),
        (ModelLoadFailed, True, True),
        (ModelLoadFailed, False, False),
        (Overloaded, True, False),
    ],
)
async def test_hub_ids_that_are_none_mean_the_default_model_and_a_hub_that_fails_is_an_error(
    error: type[SDBentoError], offline: bool, replaced: bool
) -> None:
    fake = app(offline=offline)
    found = fake.find_model

    async def find_model(name: str | None = None) -> ModelSpec:
        if name is not None:
            raise error("no")
        return cast(ModelSpec, await found(name))

    fake.find_model = find_model
    body = ImageBody(prompt="x", model="somebody/something")
    if replaced:
        order = await to_order(fake, body)
        assert order.request.model is None and "somebody/something" in order.warnings[0]
    else:
        with pytest.raises(error):
            await to_order(fake, body)


async def test_hub_ids_are_ours_only_where_requests_may_name_them() -> None:
    body = ImageBody(prompt="x", model="somebody/something")
    with pytest.raises(AssertionError, match="the Hub is asked about somebody/something"):
        await to_order(app(), body)
    order = await to_order(app(allow_any_model=False), body)
    assert order.spec.name == "shapes"


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"n": "3"}, "num_images", 3),
        ({"n": 2, "batch_size": 4}, "num_images", 2),
        ({"steps": "5"}, "num_inference_steps", 5),
        ({"num_inference_steps": 4, "steps": 5}, "num_inference_steps", 4),
        ({"num_inference_steps": None, "steps": 5}, "num_inference_steps", 5),
        ({"cfg": 3}, "guidance_scale", 3.0),
        ({"cfg_scale": "3.5"}, "guidance_scale", 3.5),
        ({"sampler": "Euler a"}, "scheduler", "Euler a"),
        ({"seed": ""}, "seed", None),
        ({"seed": "7"}, "seed", 7),
        ({"negative_prompt": ""}, "negative_prompt", ""),
        ({"guidance_rescale": None}, "guidance_rescale", 0.0),
        ({"output_format": "JPG"}, "output_format", "jpeg"),
        ({"original_size": "[64, 32]"}, "original_size", (64, 32)),
    ],
)
async def test_fields_of_ours_come_under_many_names_and_as_text(
    given: dict[str, Any], field: str, value: object
) -> None:
    assert getattr(await requested(**given), field) == value


async def test_objects_may_come_as_text() -> None:
    request = await requested(lora='[{"model_id": "outline", "weight": 0.5}]', prompt="[a] {b}")
    assert request.lora is not None and request.lora[0].weight == 0.5
    assert request.prompt == "[a] {b}"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"n": 17}, "n"),
        ({"n": [1]}, "n"),
        ({"steps": "many"}, "steps"),
        ({"cfg": float("nan")}, "cfg"),
        ({"partial_images": 4}, "partial_images"),
        ({"stream": "maybe"}, "stream"),
        ({"quality": "best"}, "quality"),
        ({"output_format": "gif"}, "output_format"),
        ({"response_format": "bytes"}, "response_format"),
        ({"refiner": {"switch_at": 3}}, "refiner"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 10_001}, "prompt"),
        ({"width": 100}, "width"),
    ],
)
def test_wrong_values_are_refused_under_the_name_that_they_came_by(
    given: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        ImageBody.model_validate({"prompt": "x"} | given)
    assert caught.value.errors()[0]["loc"][0] == named


async def test_fields_that_nobody_knows_and_those_without_effect_are_ignored() -> None:
    more = {"style": "vivid", "moderation": "low", "user": 7, "frame_count": "x", "": 1}
    assert await requested(**more) == await requested()


async def test_a_transparent_background_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="every pixel"):
        await ordered(background="transparent")
    for background in ("auto", "opaque", None):
        await ordered(background=background)


@pytest.mark.parametrize(
    ("given", "every"),
    [
        ({"partial_images": 3}, 5),
        ({"partial_images": 1}, 10),
        ({"partial_images": 3, "steps": 2}, 1),
        ({"partial_images": 3, "strength": 0.4}, 2),
    ],
)
async def test_partial_images_are_spread_over_the_steps(given: dict[str, Any], every: int) -> None:
    assert preview_every(await ordered(**given)) == every


@pytest.mark.parametrize(
    ("model", "response_format", "urls"),
    [
        (None, None, False),
        ("gpt-image-1", None, False),
        ("dall-e-2", None, True),
        ("DALL-E-3", None, True),
        ("dall-e-3", "b64_json", False),
        ("gpt-image-1", "URL", True),
    ],
)
async def test_urls_are_for_those_who_ask_and_for_dall_e(
    model: str | None, response_format: str | None, urls: bool
) -> None:
    order = await ordered(model=model, response_format=response_format)
    assert order.wants_urls is urls
