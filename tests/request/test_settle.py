from __future__ import annotations

from typing import Any

import pytest

from sdbento.catalog.families import Family
from sdbento.catalog.specs import ModelSpec
from sdbento.environment import load_settings
from sdbento.errors import InvalidParameter, UnknownSampler
from sdbento.request.schema import GenerateRequest, nearest_side
from sdbento.request.settle import SettledRequest, check_fields, settle
from tests.support.images import base64, data_uri, gradient, half_mask

SETTINGS = load_settings()
IMAGE, MASK = data_uri(gradient()), base64(half_mask())
MAX_PIXELS = 512 * 512


def spec(family: Family = Family.SD15) -> ModelSpec:
    return ModelSpec("m", family, (), 512, 256, 20, 7.5, "Euler", 1.0)


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt="a cat", **fields)


def settled(sent: tuple[int, int] | None = None, **fields: Any) -> SettledRequest:
    check_fields(request(**fields), spec())
    return settle(request(**fields), spec(), sent, MAX_PIXELS)[0]


def sized(sent: tuple[int, int] | None = None, **fields: Any) -> tuple[int, int]:
    decided = settled(sent, **fields)
    return decided.width, decided.height


def test_fields_left_open_take_the_models_defaults() -> None:
    decided = settled()
    assert (decided.num_inference_steps, decided.guidance_scale) == (20, 7.5)
    assert (decided.scheduler, decided.strength) == ("Euler", None)
    assert decided.seed >= 0


def test_strength_defaults_to_that_of_the_stock_pipeline() -> None:
    assert settled(image=IMAGE).strength == 0.8
    assert settled(image=IMAGE, mask_image=MASK).strength == 1.0
    assert settled(image=IMAGE, outpaint={"left": 8}).strength == 1.0
    assert settled(image=IMAGE, strength=0.3).strength == 0.3
    assert settled(image=IMAGE, upscale={"strength": 0.2}).strength == 0.2


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"strength": 0.5}, "strength", "needs image"),
        ({"mask_image": MASK}, "mask_image", "needs image"),
        ({"outpaint": {"left": 8}}, "outpaint", "needs image"),
        ({"upscale": {}}, "upscale", "needs image"),
        ({"image": IMAGE, "mask_blur": 4}, "mask_blur", "needs mask_image or outpaint"),
        ({"image": IMAGE, "padding_mask_crop": 4}, "padding_mask_crop", "needs mask_image"),
        ({"image": IMAGE, "mask_image": MASK, "hires": {}}, "hires", "mask_image"),
        ({"image": IMAGE, "upscale": {}, "strength": 0.5}, "strength", "upscale"),
        ({"image": IMAGE, "upscale": {}, "width": 64}, "width", "upscale"),
        ({"refiner": {}}, "refiner", "SDXL"),
        (
            {"controlnet": {"type": "a"}, "deep_cache_interval": 2},
            "controlnet",
            "deep_cache_interval",
        ),
        ({"guidance_start": 0.5, "guidance_end": 0.4}, "guidance_end", "below guidance_start"),
        (
            {"controlnet": {"type": "a", "guidance_start": 1.0, "guidance_end": 0.0}},
            "controlnet.0.guidance_end",
            "below",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused_by_name(
    fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(InvalidParameter, match=words) as caught:
        check_fields(request(**fields), spec())
    assert caught.value.param == param


def test_the_refiner_does_not_follow_a_second_pass() -> None:
    with pytest.raises(InvalidParameter, match="refiner does not go together with hires"):
        check_fields(request(refiner={}, hires={}), spec(Family.SDXL))


def test_an_unknown_sampler_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(UnknownSampler):
        check_fields(request(scheduler="Eulr", image="https://pictures.invalid/a.png"), spec())


def test_the_size_is_that_of_the_sent_image_else_the_models() -> None:
    assert sized() == (512, 256)
    assert sized((77, 145)) == (72, 144)
    assert sized((203, 101), image=IMAGE) == (200, 96)
    assert sized((203, 101), image=IMAGE, width=64) == (64, 96)
    assert sized((203, 101), image=IMAGE, width=64, height=72) == (64, 72)


def test_a_side_is_rounded_up_where_both_are_as_near() -> None:
    sides = [nearest_side(side) for side in (1, 515.9, 516, 519, 524, 4096)]
    assert sides == [64, 512, 520, 520, 528, 4096]


def test_an_upscaled_image_has_the_size_that_its_scale_gives() -> None:
    assert sized((100, 60), image=IMAGE, upscale={"scale": 1.5}) == (144, 88)


def test_an_image_over_the_limit_is_reduced_and_the_answer_says_so() -> None:
    decided, warnings = settle(request(image=IMAGE), spec(), (2000, 1000), MAX_PIXELS)
    assert 0.9 * MAX_PIXELS < decided.width * decided.height <= MAX_PIXELS
    assert decided.width == pytest.approx(2 * decided.height, abs=16)
    assert "2000 x 1000 was reduced to" in warnings[0]


def test_a_tiny_image_gets_the_smallest_allowed_size() -> None:
    assert sized((20, 10), image=IMAGE) == (64, 64)


@pytest.mark.parametrize(
    "fields", [{"width": 1024, "height": 512}, {"width": 512, "height": 512, "hires": {}}]
)
def test_a_size_over_the_limit_names_the_limit(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=f"at most {MAX_PIXELS} pixels"):
        sized(**fields)


def test_results_put_back_into_large_originals_are_limited_together() -> None:
    crop = {"image": IMAGE, "mask_image": MASK, "padding_mask_crop": 0}
    largest = (4 * 512, 4 * 512)
    assert settled(largest, **crop).num_images == 1
    assert settled((512, 512), **crop, num_images=16).num_images == 16
    with pytest.raises(InvalidParameter, match="SDBENTO_MAX_PIXELS") as caught:
        settled(largest, **crop, num_images=2)
    assert caught.value.param == "num_images"
    assert settled(largest, image=IMAGE, num_images=16).num_images == 16
