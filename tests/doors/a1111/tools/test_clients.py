"""Real clients and what others send when they connect, against a real server."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

import pytest
import webuiapi
from PIL import ImageChops

from tests.support import images
from tests.support.server import Server

PHOTO = images.gradient(48, 32)
QUICK = {"prompt": "a red circle, large", "negative_prompt": "blurry", "seed": 7, "steps": 2}
QUICK |= {"width": 64, "height": 64, "cfg_scale": 4}


@pytest.fixture
def client(server: Server) -> webuiapi.WebUIApi:
    address = urlsplit(server.url)
    return webuiapi.WebUIApi(host=address.hostname, port=address.port)


def get(server: Server, route: str) -> Any:
    response = server.client.get(f"/sdapi/v1/{route}")
    assert response.status_code == 200, response.text
    return response.json()


def post(server: Server, route: str, body: Any = None) -> Any:
    response = server.client.post(f"/sdapi/v1/{route}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_webuiapi_reads_every_list(client: webuiapi.WebUIApi) -> None:
    assert client.get_options()["sd_model_checkpoint"] == "shapes"
    assert client.get_cmd_flags()["api"] is True
    assert "Euler a" in client.util_get_sampler_names()
    assert "karras" in client.util_get_scheduler_names()
    assert [one["name"] for one in client.get_upscalers()][:2] == ["None", "Lanczos"]
    assert client.get_latent_upscale_modes() == [{"name": "Latent"}]
    assert "outline" in [one["name"] for one in client.get_loras()]
    assert client.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert client.get_memory()["ram"]["total"] > 0
    assert client.get_scripts()["txt2img"][0] == "controlnet"
    for empty in ("sd_vae", "hypernetworks", "face_restorers", "realesrgan_models"):
        assert getattr(client, f"get_{empty}")() == []
    assert client.get_prompt_styles() == []
    assert client.refresh_checkpoints() is None


def test_webuiapi_chooses_a_model(client: webuiapi.WebUIApi) -> None:
    assert "shapes" in client.util_get_model_names()
    client.util_set_model("shape")  # it looks for the closest title itself
    assert client.util_get_current_model() == "shapes"
    client.set_options({"sd_model_checkpoint": "shapes", "CLIP_stop_at_last_layers": 1})
    client.util_wait_for_ready(0.1)


def test_webuiapi_reads_how_an_image_was_made(client: webuiapi.WebUIApi) -> None:
    made = client.txt2img(**QUICK, sampler_name="DPM++ 2M Karras")
    read = client.png_info(made.image)
    assert read.info == made.info["infotexts"][0]
    assert read.parameters["Prompt"] == QUICK["prompt"]
    assert read.parameters["Negative prompt"] == "blurry"
    assert (read.parameters["Size-1"], read.parameters["Size-2"]) == ("64", "64")
    assert (read.parameters["Seed"], read.parameters["Steps"]) == ("7", "2")


def test_webuiapi_enlarges_images(client: webuiapi.WebUIApi) -> None:
    one = client.extra_single_image(PHOTO, upscaler_1=webuiapi.Upscaler.Lanczos, upscaling_resize=2)
    assert one.image.size == (96, 64)
    two = client.extra_batch_images(
        [PHOTO, PHOTO],
        upscaler_1=webuiapi.Upscaler.Nearest,
        resize_mode=1,
        upscaling_resize_w=64,
        upscaling_resize_h=64,
    )
    assert [image.size for image in two.images] == [(64, 64), (64, 64)]
    same = client.extra_single_image(PHOTO)
    assert ImageChops.difference(same.image, PHOTO).getbbox() is None


def test_webuiapi_makes_control_images(client: webuiapi.WebUIApi) -> None:
    assert client.controlnet_version() == 3
    assert client.controlnet_model_list() == ["None", "canny"]
    assert {"none", "canny", "scribble", "tile"} <= {*client.controlnet_module_list()}
    detected = client.controlnet_detect([PHOTO], module="canny", processor_res=64)
    assert detected.image.size == (96, 64)
    assert detected.info.startswith("Success")


def test_webuiapi_is_told_what_is_not_offered(client: webuiapi.WebUIApi) -> None:
    with pytest.raises(RuntimeError, match="not offered"):
        client.interrogate(PHOTO)


def test_open_webui_connects_chooses_and_draws(server: Server) -> None:
    get(server, "options")
    models = get(server, "sd-models")
    assert {"title", "model_name"} <= models[0].keys()
    options = get(server, "options")
    options["sd_model_checkpoint"] = models[0]["title"]
    assert post(server, "options", options) is None
    assert get(server, "options")["sd_model_checkpoint"] == models[0]["title"]
    drawn = post(server, "txt2img", {**QUICK, "batch_size": 1})
    assert json.loads(drawn["info"])["sd_model_name"] == "shapes"


def test_sillytavern_connects_and_waits_for_its_model(server: Server) -> None:
    get(server, "options")
    assert all("name" in one for one in get(server, "upscalers"))
    assert all("name" in one for one in get(server, "latent-upscale-modes"))
    assert get(server, "sd-vae") == get(server, "sd-modules") == []
    assert all("name" in one for one in get(server, "samplers"))
    assert all("name" in one for one in get(server, "schedulers"))
    title = get(server, "sd-models")[0]["title"]
    post(server, "options", {"sd_model_checkpoint": title})
    progress = get(server, "progress")
    assert progress["progress"] == 0
    assert progress["state"]["job_count"] == 0
    assert get(server, "options")["sd_model_checkpoint"] == title
    assert "forge_preset" not in get(server, "options")


def test_sdai_reads_what_it_needs(server: Server) -> None:
    """Its samplers' options must be texts by names (Stable-Diffusion-KMP, network/…/response)."""
    for sampler in get(server, "samplers"):
        assert all(isinstance(value, str) for value in sampler["options"].values())
    for route in ("loras", "embeddings", "hypernetworks", "sd-models", "sd-modules"):
        get(server, route)
    for route in ("scripts", "script-info", "extensions", "options"):
        get(server, route)


def test_ai_render_reads_what_it_needs(server: Server) -> None:
    for route in ("controlnet/model_list", "controlnet/module_list"):
        answer = server.client.get(f"/{route}").json()
        assert "canny" in answer[route.rpartition("/")[2]]
    photo = images.data_uri(PHOTO)
    for upscaler in get(server, "upscalers"):
        body = {"resize_mode": 0, "upscaling_resize": 2, "upscaler_1": upscaler["name"]}
        assert post(server, "extra-single-image", {**body, "image": photo})["image"]


def test_paths_that_end_in_a_slash(server: Server) -> None:
    for route in ("sdapi/v1/options", "controlnet/version", "models"):
        response = server.client.get(f"/{route}/", follow_redirects=False)
        assert response.status_code == 200
