"""What there is, in the shapes of AUTOMATIC1111's API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from starlette.testclient import TestClient

from sdbento.samplers.names import list_samplers
from tests.support.a1111 import assert_failed, caller, serving_a1111
from tests.support.tiny import save_tiny

EMPTY = "sd-vae sd-modules hypernetworks face-restorers realesrgan-models prompt-styles extensions"
REFRESHED = ("checkpoints", "vae", "loras", "embeddings")


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with serving_a1111(tmp_path) as client:
        yield client


def get(client: TestClient, route: str, name: str = "") -> Any:
    response = client.get(f"/sdapi/v1/{route}", headers=caller(name))
    assert response.status_code == 200, response.text
    return response.json()


def test_samplers(client: TestClient) -> None:
    samplers = get(client, "samplers")
    assert [one["name"] for one in samplers] == [one.name for one in list_samplers()]
    [euler_a] = [one for one in samplers if one["name"] == "Euler a"]
    assert euler_a.keys() == {"name", "aliases", "options"}
    assert "euler_ancestral" in euler_a["aliases"]
    assert euler_a["options"] == {}  # SDAI reads texts by names


def test_schedulers_are_those_that_are_not_replaced(client: TestClient) -> None:
    schedulers = get(client, "schedulers")
    assert schedulers[0] == {
        "name": "automatic",
        "label": "Automatic",
        "aliases": None,
        "default_rho": -1.0,
        "need_inner_model": False,
    }
    names = [one["name"] for one in schedulers]
    assert {"karras", "exponential", "sgm_uniform", "normal", "beta"} <= {*names}
    assert "kl_optimal" not in names


def test_upscalers(client: TestClient) -> None:
    upscalers = get(client, "upscalers")
    assert [one["name"] for one in upscalers] == ["None", "Lanczos", "Nearest", "Bicubic"]
    assert upscalers[1] == {
        "name": "Lanczos",
        "model_name": None,
        "model_path": None,
        "model_url": None,
        "scale": 4.0,
    }
    assert get(client, "latent-upscale-modes") == [{"name": "Latent"}]


def test_models_with_the_callers_own_first(client: TestClient) -> None:
    assert get(client, "sd-models")[0] == {
        "title": "shapes",
        "model_name": "shapes",
        "hash": None,
        "sha256": None,
        "filename": "shapes",
        "config": None,
    }
    chosen = {"sd_model_checkpoint": "sd15"}
    client.post("/sdapi/v1/options", json=chosen, headers=caller("alice"))
    titles = [model["title"] for model in get(client, "sd-models", "alice")]
    assert titles[0] == "runwayml/stable-diffusion-v1-5"
    assert len(titles) == len({*titles})
    assert {*titles} == {model["title"] for model in get(client, "sd-models")}


def test_a_model_that_was_put_into_the_folder_is_there_at_once(
    client: TestClient, tmp_path: Path
) -> None:
    save_tiny("sd15", tmp_path / "models_dir" / "mine")
    assert "mine" in [model["title"] for model in get(client, "sd-models")]


def test_loras(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "lora_dir" / "styles").mkdir(parents=True)
    (tmp_path / "lora_dir" / "styles" / "ink.safetensors").touch()
    listed = get(client, "loras")
    assert listed[0] == {
        "name": "styles/ink",
        "alias": "styles/ink",
        "path": "styles/ink",
        "metadata": {},
    }
    models = {lora["name"]: lora["metadata"] for lora in listed}
    assert models["outline"] == {"ss_sd_model_name": "shapes"}


def test_embeddings(client: TestClient, tmp_path: Path) -> None:
    folder = tmp_path / "embeddings_dir"
    folder.mkdir()
    save_file({"emb_params": torch.ones(3, 32)}, folder / "ink.safetensors")
    sdxl = {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 64)}
    save_file(sdxl, folder / "large.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no")
    (folder / "pickled.pt").write_bytes(b"no")
    unknown = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    assert get(client, "embeddings") == {
        "loaded": {"ink": {**unknown, "shape": 32, "vectors": 3}},
        "skipped": {"large": {**unknown, "shape": 32, "vectors": 2}},
    }


@pytest.mark.parametrize("route", EMPTY.split())
def test_what_there_is_none_of(client: TestClient, route: str) -> None:
    assert get(client, route) == []


@pytest.mark.parametrize("what", REFRESHED)
def test_refreshing(client: TestClient, what: str) -> None:
    response = client.post(f"/sdapi/v1/refresh-{what}")
    assert (response.status_code, response.json()) == (200, None)


@pytest.mark.parametrize("route", ["samplers", "sd-models", "options", "sd-vae"])
def test_a_path_may_end_in_a_slash(client: TestClient, route: str) -> None:
    response = client.get(f"/sdapi/v1/{route}/", follow_redirects=False)
    assert response.json() == get(client, route)


def test_wrong_methods_are_told_in_the_doors_shape(client: TestClient) -> None:
    assert_failed(client.post("/sdapi/v1/samplers"), 405, "takes GET, not POST")
    assert_failed(client.get("/sdapi/v1/no-such-route"), 404, "no-such-route")
