"""Effects of request fields, measured on the images of a real server on `shapes`, over HTTP."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sdbento.images import codec
from sdbento.images.metadata import read_metadata
from sdbento.images.preprocessors import preprocess
from tests.support.images import data_uri, half_mask
from tests.support.server import Server, assert_error, generated, pixels, post

STEPS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.0}
CIRCLE: dict[str, Any] = {"prompt": "a large red circle on a blue background", "seed": 1, **STEPS}
Pixels = NDArray[np.int16]


def drawing(shape: str = "circle") -> Image.Image:
    """A large red shape on blue, as a user might upload it."""
    image = Image.new("RGB", (128, 128), (40, 80, 220))
    draw = getattr(ImageDraw.Draw(image), "ellipse" if shape == "circle" else "rectangle")
    draw((34, 34, 94, 94), fill=(220, 40, 40))
    return image


def is_red(image: Pixels) -> NDArray[np.bool_]:
    red, green, blue = np.moveaxis(image, -1, 0)
    found: NDArray[np.bool_] = (red > 140) & (green < 110) & (blue < 110)
    return found


def is_blue(image: Pixels) -> NDArray[np.bool_]:
    red, _, blue = np.moveaxis(image, -1, 0)
    found: NDArray[np.bool_] = (blue > 140) & (red < 110)
    return found


def overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union."""
    return float((one & other).sum() / max(1, (one | other).sum()))


def form(server: Server, path: str, images: dict[str, Image.Image], **fields: Any) -> Pixels:
    files = {name: (f"{name}.png", codec.encode(image, "png")) for name, image in images.items()}
    answer = server.client.post(path, files=files, data={k: str(v) for k, v in fields.items()})
    assert answer.status_code == 200, answer.text
    return pixels(answer.content)


def test_image_to_image_keeps_the_place_and_takes_the_prompts_colour(server: Server) -> None:
    fields = {"prompt": "a large green circle on a blue background", "seed": 3, **STEPS}
    image = form(server, "/img2img", {"image": drawing()}, strength=0.8, **fields)
    red, green, blue = image[64, 64]
    assert green > max(red, blue)
    assert is_blue(image)[4, 4]


def test_little_strength_changes_little(server: Server) -> None:
    original = np.asarray(drawing(), np.int16)
    fields = {**CIRCLE, "image": data_uri(drawing())}
    near, far = (
        np.abs(generated(server, strength=strength, **fields)[0] - original).mean()
        for strength in (0.2, 1.0)
    )
    assert near < 12 < far or near < far / 1.5


def test_the_masked_half_changes_and_the_rest_does_not(server: Server) -> None:
    plain = Image.new("RGB", (128, 128), (40, 80, 220))
    fields = {"prompt": "a large red circle on a blue background", "seed": 2, **STEPS}
    images = {"image": plain, "mask_image": half_mask(128, 128)}
    image = form(server, "/inpaint", images, mask_blur=2, **fields)
    original = np.asarray(plain, np.int16)
    assert np.abs(image[:, :56] - original[:, :56]).max() == 0
    assert np.abs(image[:, 72:] - original[:, 72:]).max() > 60


def test_outpainting_adds_the_requested_margins_and_keeps_the_image(server: Server) -> None:
    fields = {**CIRCLE, "image": data_uri(drawing()), "outpaint": {"left": 64}}
    [image] = generated(server, **fields)
    assert image.shape == (128, 192, 3)
    original = np.asarray(drawing(), np.int16)
    assert np.abs(image[:, 64 + 40 :] - original[:, 40:]).max() <= 1
    assert is_blue(image[:, :40]).mean() > 0.5


@pytest.mark.parametrize("shape", ["circle", "square"])
def test_the_shape_follows_the_drawn_edges(server: Server, shape: str) -> None:
    """The prompt names no shape: only the edges define it."""
    edges = preprocess("canny", drawing(shape))
    fields = {"prompt": "a red shape on a blue background", "seed": 4, **STEPS}
    control = {"type": "canny", "image": data_uri(edges)}
    wanted = is_red(np.asarray(drawing(shape), np.int16))
    [steered] = generated(server, controlnet=control, **fields)
    [free] = generated(server, **fields)
    assert overlap(is_red(steered), wanted) > 0.85
    assert overlap(is_red(free), wanted) < overlap(is_red(steered), wanted)


def test_the_server_finds_the_edges_itself(server: Server) -> None:
    fields = {"prompt": "a red shape on a blue background", "seed": 4, **STEPS}
    mine, its = (
        generated(server, controlnet={"type": "canny", **control}, **fields)[0]
        for control in (
            {"image": data_uri(preprocess("canny", drawing()))},
            {"image": data_uri(drawing()), "preprocess": True},
        )
    )
    assert np.abs(mine - its).max() <= 1


def inside(image: Pixels) -> Pixels:
    return image[52:76, 52:76]


def test_the_outline_lora_empties_the_shape(server: Server) -> None:
    fields = {**CIRCLE, "seed": 5}
    [solid] = generated(server, **fields)
    [outlined] = generated(server, lora={"model_id": "outline"}, **fields)
    assert is_red(inside(solid)).mean() > 0.9
    assert is_blue(inside(outlined)).mean() > 0.8
    assert is_red(outlined).mean() > 0.02


def test_a_tag_in_the_prompt_means_the_same_as_the_field(server: Server) -> None:
    fields = {**CIRCLE, "num_inference_steps": 6}
    tagged: dict[str, Any] = {**fields, "prompt": f"{fields['prompt']} <lora:checker:0.7>"}
    [by_tag] = generated(server, **tagged)
    [by_field] = generated(server, lora={"model_id": "checker", "weight": 0.7}, **fields)
    [without] = generated(server, **fields)
    assert np.abs(by_tag - by_field).max() <= 1
    assert np.abs(by_tag - without).max() > 30


def test_a_tag_of_an_unknown_name_is_the_one_lora_listed(server: Server) -> None:
    fields = {**CIRCLE, "num_inference_steps": 6}
    tagged: dict[str, Any] = {**fields, "prompt": f"{fields['prompt']} <lora:name:0.5>"}
    [both] = generated(server, lora={"model_id": "outline", "weight": 0.8}, **tagged)
    [product] = generated(server, lora={"model_id": "outline", "weight": 0.4}, **fields)
    assert np.abs(both - product).max() <= 1
    assert_error(post(server, **tagged), 422, "name", "outline", param="prompt")


def test_a_second_pass_makes_the_image_larger(server: Server) -> None:
    fields = {**CIRCLE, "hires": {"scale": 1.5, "strength": 0.4}}
    [image] = generated(server, **fields)
    assert image.shape == (192, 192, 3)
    assert is_red(image)[96, 96] and is_blue(image)[4, 4]


def test_a_given_image_is_enlarged(server: Server) -> None:
    fields = {**CIRCLE, "image": data_uri(drawing()), "upscale": {"scale": 2, "strength": 0.3}}
    [image] = generated(server, **fields)
    assert image.shape == (256, 256, 3)
    assert is_red(image)[128, 128] and is_blue(image)[8, 8]


def test_emphasis_and_long_prompts_reach_the_image(server: Server) -> None:
    fields = {**CIRCLE, "num_inference_steps": 6}
    [plain] = generated(server, **fields)
    for prompt in (
        "a large (red:1.5) circle on a blue background",
        "a large red circle on a blue background" + ", drawn" * 100,
        "a large red circle BREAK on a blue background",
    ):
        [other] = generated(server, **{**fields, "prompt": prompt})
        assert np.abs(plain - other).max() > 3, prompt


def test_an_edited_prompt_begins_as_one_thing_and_ends_as_another(server: Server) -> None:
    edited = {**CIRCLE, "prompt": "a large [red:green:0.3] circle on a blue background"}
    [image] = generated(server, **edited)
    red, green, _ = image[64, 64]
    assert green > red


def test_guidance_in_part_of_the_steps_gives_another_image(server: Server) -> None:
    fields = {**CIRCLE, "num_inference_steps": 8}
    [whole] = generated(server, **fields)
    [part] = generated(server, guidance_end=0.5, **fields)
    assert np.abs(whole - part).max() > 3


@pytest.mark.parametrize("less", [{"deep_cache_interval": 2}, {"token_merging_ratio": 0.5}])
def test_less_work_makes_nearly_the_same_image_and_is_told_in_it(
    server: Server, less: dict[str, Any]
) -> None:
    [whole], answer = generated(server, **CIRCLE), post(server, "/txt2img", **CIRCLE, **less)
    image = pixels(answer.content)
    assert np.abs(image - whole).max() > 3
    assert overlap(is_red(image), is_red(whole)) > 0.9
    embedded = read_metadata(answer.content).parameters or {}
    assert less.items() <= embedded.items()


def test_an_image_carries_digests_of_its_input_images(server: Server) -> None:
    fields = {**CIRCLE, "num_inference_steps": 4, "image": data_uri(drawing()), "strength": 0.5}
    answer = post(server, "/img2img", **fields)
    embedded = read_metadata(answer.content).parameters or {}
    assert embedded["image"].startswith("sha256:")
    assert embedded["strength"] == 0.5
    assert len(answer.content) < 100_000


BAD: list[tuple[dict[str, Any], int, list[str], str]] = [
    ({"image": "hello"}, 422, ["image"], "image"),
    ({"image": "https://127.0.0.1:1/a.png"}, 422, ["could not be fetched"], "image"),
    ({"image": base64.b64encode(b"no image").decode()}, 422, ["image"], "image"),
    ({"strength": 0.5}, 422, ["needs image"], "strength"),
    ({"image": data_uri(drawing()), "strength": 0.01}, 422, ["strength", "no step"], "strength"),
    ({"controlnet": {"type": "cany"}}, 422, ["canny"], "controlnet.type"),
    ({"controlnet": {"type": "canny"}}, 422, ["required"], "controlnet.0.image"),
    ({"controlnet": {"type": "x"}, "deep_cache_interval": 2}, 422, ["interval"], "controlnet"),
    ({"lora": {"model_id": "outlin"}}, 422, ["outline"], "lora"),
    ({"prompt_2": "x"}, 422, ["SDXL"], "prompt_2"),
    ({"prompt": "x <lora:nobody>"}, 422, ["nobody"], "prompt"),
    ({"refiner": {}}, 422, ["SDXL"], "refiner"),
    ({"clip_skip": 9}, 422, ["clip_skip"], "clip_skip"),
    ({"prompt": "word " * 1999}, 422, ["tokens"], "prompt"),
]


@pytest.mark.parametrize(("fields", "status", "words", "param"), BAD)
def test_bad_requests_get_a_helpful_message(
    server: Server, fields: dict[str, Any], status: int, words: list[str], param: str
) -> None:
    answer = post(server, **{"prompt": "a circle", "num_inference_steps": 4, **fields})
    assert_error(answer, status, *words, param=param)


def test_a_form_without_a_required_image_is_refused_by_name(server: Server) -> None:
    answer = server.client.post("/inpaint", files={"image": b"x"}, data={"prompt": "a"})
    assert_error(answer, 422, "mask_image is required", param="mask_image")
    answer = server.client.post(
        "/img2img",
        content=b"--x\r\nbroken",
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert answer.status_code in (400, 422), answer.text


def test_a_number_is_accepted_as_a_prompt(server: Server) -> None:
    image = form(server, "/img2img", {"image": drawing()}, prompt=123, num_inference_steps=4)
    assert image.shape == (128, 128, 3)
