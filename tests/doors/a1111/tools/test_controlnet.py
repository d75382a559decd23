"""The routes of the ControlNet extension."""

from __future__ import annotations

import importlib.util
import sys
from base64 import b64decode, b64encode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageDraw
from starlette.testclient import TestClient

from sdbento.images import preprocessors
from sdbento.images.codec import encode
from tests.support.a1111 import assert_failed, caller, serving_a1111

DETECT = "/controlnet/detect"
SQUARE = Image.new("RGB", (96, 64), "white")
ImageDraw.Draw(SQUARE).rectangle((20, 20, 60, 40), "black")


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with serving_a1111(tmp_path) as client:
        yield client


def get(client: TestClient, route: str, name: str = "") -> Any:
    response = client.get(f"/controlnet/{route}", headers=caller(name))
    assert response.status_code == 200, response.text
    return response.json()


def sent(image: Image.Image = SQUARE) -> str:
    return b64encode(encode(image, "png")).decode()


def detected(client: TestClient, **fields: Any) -> tuple[Image.Image, str]:
    response = client.post(DETECT, json={"controlnet_input_images": [sent()]} | fields)
    assert response.status_code == 200, response.text
    [data] = response.json()["images"]
    return Image.open(BytesIO(b64decode(data, validate=True))), response.json()["info"]


def assert_same(one: Image.Image, other: Image.Image) -> None:
    assert ImageChops.difference(one, other).getbbox() is None


def test_what_there_is(client: TestClient) -> None:
    assert get(client, "version") == {"version": 3}
    assert get(client, "settings") == {"control_net_unit_count": 8}
    assert get(client, "model_list?update=true") == {"model_list": ["None", "canny"]}
    modules = get(client, "module_list?alias_names=true")
    assert modules["module_list"][:4] == ["none", "canny", "scribble", "tile"]
    assert modules["module_detail"]["canny"] == {"model_free": False, "sliders": []}


def test_the_models_are_those_for_the_callers_checkpoint(client: TestClient) -> None:
    chosen = {"sd_model_checkpoint": "sd15"}
    client.post("/sdapi/v1/options", json=chosen, headers=caller("alice"))
    assert "openpose" in get(client, "model_list", "alice")["model_list"]
    assert get(client, "model_list", "bob")["model_list"] == ["None", "canny"]


def test_types(client: TestClient) -> None:
    types = get(client, "control_types")["control_types"]
    assert types["Canny"] == {
        "module_list": ["none", "canny"],
        "model_list": ["None", "canny"],
        "default_option": "canny",
        "default_model": "canny",
    }
    assert types["Tile"]["default_model"] == "None"
    assert types["All"]["default_option"] == "none"


def test_networks_are_listed_where_their_package_is(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert get(client, "module_list")["module_list"] == ["none", "canny", "scribble", "tile"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert "openpose" in get(client, "module_list")["module_list"]


@pytest.mark.parametrize("module", ["canny", "Canny", "t2ia_canny"])
def test_edges(client: TestClient, module: str) -> None:
    image, info = detected(client, controlnet_module=module, controlnet_processor_res=64)
    assert_same(image, preprocessors.canny(SQUARE))
    assert info.startswith("Success")


def test_the_resolution_is_that_of_the_shorter_side(client: TestClient) -> None:
    for resolution, height in ((128, 128), (-1, 512), (None, 512)):
        fields = {"controlnet_module": "tile", "controlnet_processor_res": resolution}
        image, _ = detected(client, **fields)
        assert image.size == (height * 3 // 2, height)


def test_without_a_module_an_image_stays_as_it_is(client: TestClient) -> None:
    for module in (None, "", "none", "None"):
        image, info = detected(client, controlnet_module=module)
        assert_same(image, SQUARE)
        assert info == "Success"


def test_webuiapi_calls_the_images_by_another_name(client: TestClient) -> None:
    body = {"controlnet_module": "canny", "controlnet_images": [f"data:image/png;base64,{sent()}"]}
    assert len(client.post(DETECT, json=body).json()["images"]) == 1


def test_what_has_no_effect_is_said(client: TestClient) -> None:
    _, info = detected(client, controlnet_module="canny", controlnet_threshold_a=64)
    assert info == "Success. Not applied: controlnet_threshold_a"
    _, info = detected(client, controlnet_module="scribble_xdog", controlnet_threshold_a=-1)
    assert info == "Success. Changed: controlnet_module scribble_xdog -> scribble"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"controlnet_input_images": []}, "controlnet_input_images"),
        ({"controlnet_input_images": None}, "controlnet_input_images is required"),
        ({"controlnet_input_images": "x"}, "controlnet_input_images"),
        ({"controlnet_input_images": [None]}, "controlnet_input_images.0"),
        ({"controlnet_input_images": ["bm8="]}, "controlnet_input_images.0"),
        ({"controlnet_input_images": [sent()] * 17}, "controlnet_input_images"),
        ({"controlnet_input_images": ["http://h/a"]}, "no URL is fetched here"),
        ({"controlnet_module": "no such module"}, "there are: none, canny, scribble, tile"),
        ({"controlnet_module": "clip_vision"}, "there are: none, canny"),
        ({"controlnet_module": 5}, "controlnet_module"),
        ({"controlnet_processor_res": 4096}, "controlnet_processor_res"),
    ],
)
def test_nonsense_is_refused(client: TestClient, fields: dict[str, Any], words: str) -> None:
    body = {"controlnet_module": "canny", "controlnet_input_images": [sent()]} | fields
    assert_failed(client.post(DETECT, json=body), 422, words)


def test_an_image_that_would_become_too_large(client: TestClient) -> None:
    thin = sent(Image.new("RGB", (1, 64)))
    body = {"controlnet_module": "canny", "controlnet_input_images": [thin]}
    assert_failed(client.post(DETECT, json=body), 422, "SDBENTO_MAX_PIXELS")


def test_a_preprocessor_whose_network_cannot_be_had(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "controlnet_aux.processor", ModuleType("broken"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    body = {"controlnet_module": "depth_midas", "controlnet_input_images": [sent()]}
    assert_failed(client.post(DETECT, json=body), 503, "depth")
