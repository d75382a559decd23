"""png-info on files of ours, of the web UI and of nobody; interrogate."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from sdbento.images.codec import MEDIA_TYPES, encode
from sdbento.images.metadata import Metadata
from tests.support.a1111 import assert_failed, serving_a1111

ROUTE = "/sdapi/v1/png-info"
RED = Image.new("RGB", (16, 8), "red")
INFOTEXT = (
    "a café ☕\nNegative prompt: blurry\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x768, "
    'Model hash: 6ce0161689, Lora hashes: "name: 1234567890ab, other: 0", Version: v1.10.1'
)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with serving_a1111(tmp_path) as client:
        yield client


def asked(client: TestClient, data: bytes, prefix: str = "") -> Any:
    response = client.post(ROUTE, json={"image": prefix + b64encode(data).decode()})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
@pytest.mark.parametrize("output_format", MEDIA_TYPES)
def test_a_file_of_the_web_ui(client: TestClient, output_format: str, prefix: str) -> None:
    answer = asked(client, encode(RED, output_format, Metadata(INFOTEXT)), prefix)
    assert answer.keys() == {"info", "items", "parameters"}
    assert answer["info"] == INFOTEXT
    assert answer["items"] == {}
    assert answer["parameters"] == {
        "Prompt": "a café ☕",
        "Negative prompt": "blurry",
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7",
        "Seed": "42",
        "Size-1": "512",
        "Size-2": "768",
        "Model hash": "6ce0161689",
        "Lora hashes": "name: 1234567890ab, other: 0",
        "Version": "v1.10.1",
    }


def test_a_file_of_ours_also_has_our_parameters(client: TestClient) -> None:
    parameters = {"prompt": "a café \ud800", "seed": 2**63 - 1}
    answer = asked(client, encode(RED, "png", Metadata(INFOTEXT, parameters)))
    assert json.loads(answer["items"]["sdbento"]) == parameters


def test_a_file_that_says_nothing(client: TestClient) -> None:
    nothing = {"Prompt": "", "Negative prompt": ""}
    assert asked(client, encode(RED, "png")) == {"info": "", "items": {}, "parameters": nothing}


def test_half_of_a_surrogate_pair_is_no_internal_error(client: TestClient) -> None:
    hostile = 'a\nSteps: 1, Seed: 2, Size: 8x8, Model: "x, \\ud800"'
    answer = asked(client, encode(RED, "png", Metadata(hostile)))
    assert answer["parameters"]["Model"] == "x, ?"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "image is required"),
        ({"image": None}, "image is required"),
        ({"image": ""}, "image is required"),
        ({"image": "  "}, "image"),
        ({"image": 5}, "image"),
        ({"image": ["x"]}, "image"),
        ({"image": "****"}, "image"),
        ({"image": b64encode(b"no image").decode()}, "no PNG, JPEG or WebP"),
        ({"image": "https://example.com/a.png"}, "no URL is fetched here"),
        ({"image": " HTTP://127.0.0.1/a.png"}, "no URL is fetched here"),
        ({"image": "data:image/png,raw"}, "not base64"),
    ],
)
def test_what_is_no_image(client: TestClient, body: Any, words: str) -> None:
    assert_failed(client.post(ROUTE, json=body), 422, words)


def test_what_is_no_object(client: TestClient) -> None:
    assert_failed(client.post(ROUTE, json=[]), 400)
    assert_failed(client.post(ROUTE, content=b"\xff"), 400)
    assert_failed(client.post(ROUTE), 400)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    buffer = BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    with serving_a1111(tmp_path, max_image_bytes=1024) as client:
        body = {"image": b64encode(buffer.getvalue()).decode()}
        assert_failed(client.post(ROUTE, json=body), 413, "SDBENTO_MAX_IMAGE_BYTES")


def test_describing_an_image_is_not_offered(client: TestClient) -> None:
    bodies: list[Any] = [{"image": "aGk=", "model": "clip"}, {}, []]
    for body in bodies:
        assert_failed(client.post("/sdapi/v1/interrogate", json=body), 501, "not offered")
