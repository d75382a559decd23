"""Enlarging images by a filter: sizes, pixels, bounds, and what is not done."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops
from starlette.testclient import TestClient

from sdbento.images.codec import encode
from sdbento.images.metadata import Metadata, read_metadata
from tests.support.a1111 import assert_failed, serving_a1111

SINGLE, BATCH = "/sdapi/v1/extra-single-image", "/sdapi/v1/extra-batch-images"
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 16, 3), np.uint8))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with serving_a1111(tmp_path) as client:
        yield client


def sent(image: Image.Image = NOISE, metadata: Metadata | None = None) -> str:
    return b64encode(encode(image, "png", metadata)).decode()


def enlarged(client: TestClient, **fields: Any) -> tuple[Image.Image, str]:
    response = client.post(SINGLE, json={"image": sent()} | fields)
    assert response.status_code == 200, response.text
    assert response.json().keys() == {"image", "html_info"}
    data = b64decode(response.json()["image"], validate=True)  # there is no "data:" before it
    return Image.open(BytesIO(data)), response.json()["html_info"]


def assert_same(one: Image.Image, other: Image.Image) -> None:
    assert ImageChops.difference(one, other).getbbox() is None


def test_by_a_factor(client: TestClient) -> None:
    image, info = enlarged(client, upscaler_1="Nearest", upscaling_resize=3)
    assert_same(image, NOISE.resize((48, 24), Image.Resampling.NEAREST))
    assert info == "<p>Postprocess upscale by: 3, Postprocess upscaler: Nearest</p>"


def test_to_a_size_with_what_is_over_cropped(client: TestClient) -> None:
    size = {"resize_mode": 1, "upscaling_resize_w": 40, "upscaling_resize_h": 30}
    image, info = enlarged(client, upscaler_1="Lanczos", **size)
    whole = NOISE.resize((60, 30), Image.Resampling.LANCZOS)
    assert_same(image, whole.crop((10, 0, 50, 30)))
    assert "Postprocess upscale to: 40x30, Postprocess crop to: 40x30" in info
    image, _ = enlarged(client, upscaler_1="Lanczos", upscaling_crop=False, **size)
    assert_same(image, whole)


def test_without_an_upscaler_an_image_stays_as_it_is(client: TestClient) -> None:
    for fields in ({}, {"upscaler_1": None}, {"upscaler_1": "None", "upscaling_resize": 4}):
        image, info = enlarged(client, **fields)
        assert_same(image, NOISE)
        assert info == ""


def test_a_second_upscaler_is_blended_in(client: TestClient) -> None:
    two = {"upscaler_1": "Nearest", "upscaler_2": "Lanczos", "extras_upscaler_2_visibility": 0.25}
    image, info = enlarged(client, **two)
    nearest, lanczos = (
        NOISE.resize((32, 16), method)
        for method in (Image.Resampling.NEAREST, Image.Resampling.LANCZOS)
    )
    assert_same(image, Image.blend(nearest, lanczos, 0.25))
    assert "Postprocess upscaler 2: Lanczos" in info


def test_what_is_not_done_is_said(client: TestClient) -> None:
    _, info = enlarged(client, gfpgan_visibility=1, codeformer_visibility="0.5")
    assert info == "<p>Not applied: GFPGAN, CodeFormer</p>"


def test_transparency_and_metadata_are_kept(client: TestClient) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    said = Metadata("a cat\nSteps: 20, Seed: 4, Size: 8x8", {"prompt": "a cat"})
    response = client.post(SINGLE, json={"image": sent(clear, said), "upscaler_1": "Lanczos"})
    data = b64decode(response.json()["image"])
    assert Image.open(BytesIO(data)).getpixel((0, 0))[3] == 0  # type: ignore[index]
    assert read_metadata(data) == said


def test_a_format_without_metadata(client: TestClient) -> None:
    buffer = BytesIO()
    NOISE.save(buffer, "BMP")
    image, _ = enlarged(client, image=b64encode(buffer.getvalue()).decode())
    assert_same(image, NOISE)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image": None}, "image is required"),
        ({"image": "no"}, "image"),
        ({"image": "https://example.com/a.png"}, "no URL is fetched here"),
        ({"upscaler_1": "R-ESRGAN 4x+"}, "there are: None, Lanczos, Nearest, Bicubic"),
        ({"upscaler_2": "LDSR"}, "there are: None, Lanczos"),
        ({"upscaler_1": ["Lanczos"]}, "upscaler_1"),
        ({"upscaling_resize": 0}, "upscaling_resize"),
        ({"upscaling_resize": 1e308}, "upscaling_resize"),
        ({"upscaling_resize": "nan"}, "upscaling_resize"),
        ({"upscaling_resize_w": 0}, "upscaling_resize_w"),
        ({"upscaling_resize_h": 10**400}, "upscaling_resize_h"),
        ({"resize_mode": 2}, "resize_mode"),
        ({"gfpgan_visibility": 2}, "gfpgan_visibility"),
    ],
)
def test_nonsense_is_refused(client: TestClient, fields: dict[str, Any], words: str) -> None:
    assert_failed(client.post(SINGLE, json={"image": sent()} | fields), 422, words)


def test_what_json_lacks_is_refused(client: TestClient) -> None:
    body = json.dumps({"image": sent(), "upscaling_resize": float("inf")})
    assert_failed(client.post(SINGLE, content=body), 422, "upscaling_resize")


def test_an_image_that_would_become_too_large(tmp_path: Path) -> None:
    with serving_a1111(tmp_path, max_pixels=4096) as client:
        thin = sent(Image.new("RGB", (1, 256)))
        to = {"resize_mode": 1, "upscaling_resize_w": 65535, "upscaling_resize_h": 1}
        for fields in (to, {"upscaling_resize": 64}):
            body = {"image": thin, "upscaler_1": "Nearest", **fields}
            assert_failed(client.post(SINGLE, json=body), 413, "SDBENTO_MAX_PIXELS")


def test_a_batch(client: TestClient) -> None:
    images = [NOISE, NOISE.transpose(Image.Transpose.ROTATE_90)]
    files = [{"data": sent(image), "name": f"{i}"} for i, image in enumerate(images)]
    response = client.post(BATCH, json={"imageList": files, "upscaler_1": "Nearest"})
    assert response.json().keys() == {"images", "html_info"}
    for data, image in zip(response.json()["images"], images, strict=True):
        expected = image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
        assert_same(Image.open(BytesIO(b64decode(data))), expected)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "imageList is required"),
        ([], "imageList"),
        ("x", "imageList"),
        ([{"name": "x"}], "imageList.0.data is required"),
        ([{"data": sent()}, {"data": "bm8="}], "imageList.1.data"),
    ],
)
def test_a_batch_that_is_none(client: TestClient, files: Any, words: str) -> None:
    assert_failed(client.post(BATCH, json={"imageList": files}), 422, words)


def test_a_batch_has_no_more_pixels_than_an_image_may(tmp_path: Path) -> None:
    with serving_a1111(tmp_path, max_pixels=4096) as client:
        file = {"data": sent(Image.new("RGB", (128, 128))), "name": "x"}
        body = {"imageList": [file] * 2, "upscaler_1": "Nearest", "upscaling_resize": 1.25}
        assert client.post(BATCH, json=body).status_code == 200
        body["imageList"] = [file] * 3
        assert_failed(client.post(BATCH, json=body), 413, "imageList.2.data")
        assert_failed(client.post(BATCH, json={"imageList": [file] * 5}), 413, "imageList.4.data")
