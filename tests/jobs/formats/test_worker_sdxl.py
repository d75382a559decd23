"""Inputs as clients of RunPod's worker-sdxl send them, and the outputs that they read."""

from __future__ import annotations

from typing import Any

import pytest

from sdbento.errors import InvalidParameter
from sdbento.jobs.formats.native import parse_input
from sdbento.request.schema import GenerateRequest, GenerateResponse, Refiner, Timings

IMAGE = "https://pictures.example/a.png"
# The repository's own example (test_input.json), shortened.
EXAMPLE: dict[str, Any] = {
    "prompt": "a steampunk dragon",
    "negative_prompt": "blurry",
    "height": 1024,
    "width": 768,
    "num_inference_steps": 20,
    "refiner_inference_steps": 50,
    "guidance_scale": 6.5,
    "strength": 0.3,
    "high_noise_frac": 0.8,
    "seed": 42,
    "scheduler": "K_EULER",
    "num_images": 2,
    "image_url": None,
}


def own(**given: Any) -> Any:
    return parse_input({"prompt": "x", "return": "worker-sdxl"} | given)


def response_of(*images: str) -> GenerateResponse:
    return GenerateResponse(
        images=list(images),
        seeds=list(range(42, 42 + len(images))),
        infotexts=["x"] * len(images),
        model="shapes",
        parameters={},
        timings=Timings(queued=0, denoising=0, decoding=0, total=0),
        warnings=["from the model"],
    )


def test_its_example_is_a_request_with_a_refiner() -> None:
    parsed = own(**EXAMPLE)
    assert parsed.request == GenerateRequest(
        prompt="a steampunk dragon",
        negative_prompt="blurry",
        width=768,
        height=1024,
        num_inference_steps=20,
        guidance_scale=6.5,
        seed=42,
        scheduler="K_EULER",
        num_images=2,
        refiner=Refiner(switch_at=0.8),
    )
    assert [warning.split()[0] for warning in parsed.warnings] == [
        "refiner_inference_steps",
        "strength",
    ]


def test_its_defaults_are_used_only_where_its_format_is_asked_for() -> None:
    request = own(seed=None, num_images=None).request
    assert (request.width, request.height, request.num_inference_steps) == (1024, 1024, 25)
    assert (request.guidance_scale, request.scheduler, request.num_images) == (7.5, "DDIM", 1)
    ours = parse_input({"prompt": "x", "image_url": IMAGE})
    assert ours.request == GenerateRequest(prompt="x", image=IMAGE)
    assert ours.warnings == ()


def test_an_image_is_changed_in_the_steps_of_its_refiner() -> None:
    parsed = own(image_url=IMAGE, width=1024, height=1024)
    request = parsed.request
    assert (request.image, request.strength, request.num_inference_steps) == (IMAGE, 0.3, 50)
    assert (request.width, request.height, request.scheduler) == (None, None, None)
    *sizes, model = parsed.warnings
    assert [warning.split()[0] for warning in sizes] == ["width", "height"]
    assert model == "the image is changed by the request's model, there by the refiner"
    again = own(image_url=IMAGE, refiner_inference_steps=12, num_inference_steps=25, strength=0.5)
    assert (again.request.num_inference_steps, again.request.strength) == (12, 0.5)
    assert again.warnings[0].startswith("num_inference_steps is not used")


def test_that_no_refiner_takes_part_is_said() -> None:
    assert own().warnings == ("no refiner took part: high_noise_frac says where it takes over",)
    assert own(image_url="").warnings == own().warnings
    all_noise = own(high_noise_frac=1.0)
    assert (all_noise.request.refiner, all_noise.warnings) == (None, own().warnings)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"image_url": IMAGE, "image": IMAGE}, "image_url"),
        ({"high_noise_frac": 0.8, "refiner": {}}, "high_noise_frac"),
        ({"high_noise_frac": 1.1}, "refiner.switch_at"),
        ({"high_noise_frac": "most"}, "refiner.switch_at"),
        ({"high_noise_frac": [0.8]}, "refiner.switch_at"),
        ({"image_url": 5}, "image"),
        ({"image_url": IMAGE, "refiner_inference_steps": 0}, "num_inference_steps"),
        ({"num_images": 0}, "num_images"),
        ({"prompt": None}, "prompt"),
        ({"stepz": 4}, "stepz"),
    ],
)
@pytest.mark.parametrize("shape", ["worker-sdxl", "full"])
def test_wrong_values_are_refused(given: dict[str, Any], param: str, shape: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        parse_input({"prompt": "x", "return": shape} | given)
    assert caught.value.param == param


def test_its_output_has_data_uris_and_the_first_image_beside_them() -> None:
    parsed = own(high_noise_frac=0.8)
    assert parsed.output(response_of("AAAA", "BBBB")) == {
        "images": ["data:image/png;base64,AAAA", "data:image/png;base64,BBBB"],
        "image_url": "data:image/png;base64,AAAA",
        "seed": 42,
        "warnings": ["from the model"],
    }
    jpeg = own(output_format="jpeg").output(response_of("AAAA"))
    assert jpeg["image_url"] == "data:image/jpeg;base64,AAAA"
    assert jpeg["warnings"][0].startswith("no refiner")
    uploaded = own().output(response_of("https://s3.example/a.png?X-Amz-Signature=1"))
    assert uploaded["images"] == ["https://s3.example/a.png?X-Amz-Signature=1"]


def test_the_full_response_has_the_warnings_too() -> None:
    parsed = parse_input({"prompt": "x", "return": "full", "refiner_inference_steps": 9})
    warnings = parsed.output(response_of("AAAA"))["warnings"]
    assert [warning.split()[0] for warning in warnings] == ["refiner_inference_steps", "from"]
