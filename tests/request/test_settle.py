from __future__ import annotations

from typing import Any

import pytest

from sdbento.catalog.families import Family
from sdbento.catalog.specs import ModelSpec
from sdbento.errors import InvalidParameter, UnknownSampler
from sdbento.request.schema import GenerateRequest
from sdbento.request.settle import Pictures, draw_controls, fix_size, gather, settle
from sdbento.settings import Settings
from tests.support.pictures import base64, data_uri, gradient, half_mask

SETTINGS = Settings.load()
IMAGE, MASK = data_uri(gradient()), base64(half_mask())
MAX_PIXELS = 512 * 512


def spec(family: Family = Family.SD15) -> ModelSpec:
    return ModelSpec("m", family, (), 512, 256, 20, 7.5, "Euler", 1.0)


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt="a cat", **fields)


def sized(pictures: Pictures | None = None, **fields: Any) -> tuple[int | None, int | None]:
    settled = settle(request(**fields), spec())
    fixed, _ = fix_size(settled, spec(), pictures or Pictures(), MAX_PIXELS)
    return fixed.width, fixed.height


def test_what_the_request_leaves_open_is_the_models() -> None:
    settled = settle(request(), spec())
    assert (settled.num_inference_steps, settled.guidance_scale) == (20, 7.5)
    assert (settled.scheduler, settled.strength) == ("Euler", None)
    assert settled.seed is not None and settled.seed >= 0


def test_strength_is_the_stock_pipelines_where_it_is_not_given() -> None:
    assert settle(request(image=IMAGE), spec()).strength == 0.8
    assert settle(request(image=IMAGE, mask_image=MASK), spec()).strength == 1.0
    assert settle(request(image=IMAGE, outpaint={"left": 8}), spec()).strength == 1.0
    assert settle(request(image=IMAGE, strength=0.3), spec()).strength == 0.3
    assert settle(request(image=IMAGE, upscale={"strength": 0.2}), spec()).strength == 0.2


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
        settle(request(**fields), spec())
    assert caught.value.param == param


def test_the_refiner_does_not_follow_a_second_pass() -> None:
    with pytest.raises(InvalidParameter, match="refiner does not go together with hires"):
        settle(request(refiner={}, hires={}), spec(Family.SDXL))


def test_an_unknown_sampler_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(UnknownSampler):
        settle(request(scheduler="Eulr", image="https://pictures.invalid/a.png"), spec())


def test_the_size_is_the_pictures_else_the_control_images_else_the_models() -> None:
    image, control = gradient(203, 101), gradient(77, 145)
    assert sized() == (512, 256)
    assert sized(Pictures(image), image=IMAGE) == (200, 96)
    assert sized(Pictures(controls=(control,))) == (72, 144)
    assert sized(Pictures(image, controls=(control,)), image=IMAGE) == (200, 96)
    assert sized(Pictures(image), image=IMAGE, width=64) == (64, 96)
    assert sized(Pictures(image), image=IMAGE, width=64, height=72) == (64, 72)


def test_an_upscaled_picture_is_as_large_as_its_scale_says() -> None:
    assert sized(Pictures(gradient(100, 60)), image=IMAGE, upscale={"scale": 1.5}) == (144, 88)


def test_a_picture_over_the_limit_is_reduced_and_the_answer_says_so() -> None:
    settled = settle(request(image=IMAGE), spec())
    fixed, warnings = fix_size(settled, spec(), Pictures(gradient(2000, 1000)), MAX_PIXELS)
    assert fixed.width is not None and fixed.height is not None
    assert 0.9 * MAX_PIXELS < fixed.width * fixed.height <= MAX_PIXELS
    assert fixed.width == pytest.approx(2 * fixed.height, abs=16)
    assert "2000 x 1000 was reduced to" in warnings[0]


def test_a_tiny_picture_gets_the_smallest_size_there_is() -> None:
    assert sized(Pictures(gradient(20, 10)), image=IMAGE) == (64, 64)


@pytest.mark.parametrize(
    "fields", [{"width": 1024, "height": 512}, {"width": 512, "height": 512, "hires": {}}]
)
def test_a_size_over_the_limit_names_the_limit(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=f"at most {MAX_PIXELS} pixels"):
        sized(**fields)


def test_pictures_are_gathered_from_whatever_they_came_in() -> None:
    settled = settle(
        request(
            image=IMAGE,
            mask_image=MASK,
            controlnet=[{"type": "canny", "preprocess": True}, {"type": "x", "image": IMAGE}],
        ),
        spec(),
    )
    pictures = gather(settled, SETTINGS)
    assert pictures.image is not None and pictures.mask is not None
    assert all(picture is not None for picture in pictures.controls)


def test_control_images_are_drawn_at_the_size_of_the_image() -> None:
    controls = [{"type": "canny", "preprocess": True}, {"type": "x"}]
    settled = settle(request(image=IMAGE, controlnet=controls, width=128, height=72), spec())
    pictures = draw_controls(settled, gather(settled, SETTINGS))
    edges, other = pictures.controls
    assert edges is not None and other is not None
    assert edges.size == (128, 72)
    assert len(edges.getcolors() or ()) == 2  # black and white
    assert other.tobytes() == gradient().tobytes()


def test_a_controlnet_without_any_picture_is_refused() -> None:
    settled = settle(request(controlnet={"type": "canny"}), spec())
    with pytest.raises(InvalidParameter, match="required") as caught:
        gather(settled, SETTINGS)
    assert caught.value.param == "controlnet.0.image"


def test_outpainting_enlarges_the_picture_before_its_size_is_fixed() -> None:
    settled = settle(request(image=IMAGE, outpaint={"left": 32, "top": 16}), spec())
    pictures = gather(settled, SETTINGS)
    assert pictures.image is not None and pictures.image.size == (96, 80)
    fixed, _ = fix_size(settled, spec(), pictures, MAX_PIXELS)
    assert (fixed.width, fixed.height) == (96, 80)
