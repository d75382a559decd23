"""webuiapi, unchanged, and pictures compared with those of /generate, against a real server."""

from __future__ import annotations

import base64
import json
import threading
import time
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import webuiapi
from PIL import Image

from tests.support import images
from tests.support.server import Server, alike, generated, pixels

PROMPT = "a red circle on a blue background"
QUICK = {"prompt": PROMPT, "seed": 7, "steps": 4, "width": 128, "height": 128, "cfg_scale": 4}
OURS = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 4, "width": 128, "height": 128}
OURS |= {"guidance_scale": 4.0}
PHOTO = images.gradient(128, 128)
MASK = images.half_mask(128, 128)
EDGES = images.box_mask(128, 128, (40, 40, 90, 90))


@pytest.fixture
def client(server: Server) -> webuiapi.WebUIApi:
    address = urlsplit(server.url)
    return webuiapi.WebUIApi(host=address.hostname, port=address.port)


def same(image: Image.Image, expected: Any) -> bool:
    return alike(np.asarray(image.convert("RGB"), dtype=np.int16), expected)


def test_webuiapi_draws_from_text(server: Server, client: webuiapi.WebUIApi) -> None:
    result = client.txt2img(**QUICK, batch_size=2)
    expected = generated(server, **OURS, scheduler="Euler a", num_images=2)
    assert len(result.images) == 2
    assert all(map(same, result.images, expected))
    assert result.info["all_seeds"] == [7, 8]
    assert result.info["infotexts"][0] == result.image.info["parameters"]
    assert result.info["extra_generation_params"] == {"Schedule type": "Automatic"}
    assert result.parameters["steps"] == 4


def test_webuiapi_draws_a_second_time_at_a_larger_size(
    server: Server, client: webuiapi.WebUIApi
) -> None:
    result = client.txt2img(
        **QUICK,
        enable_hr=True,
        hr_scale=1.5,
        denoising_strength=0.5,
        sampler_name="DPM++ 2M Karras",
    )
    hires = {"scale": 1.5, "steps": 8, "strength": 0.5, "upscaler": "latent"}  # of 8, 4 are done
    expected = generated(server, **OURS, scheduler="DPM++ 2M Karras", hires=hires)
    assert same(result.image, expected[0])
    assert result.info["extra_generation_params"]["Hires upscale"] == "1.5"


def test_webuiapi_draws_from_an_image(server: Server, client: webuiapi.WebUIApi) -> None:
    result = client.img2img(images=[PHOTO], **QUICK, denoising_strength=0.5)
    image = images.base64(PHOTO)
    expected = generated(server, **OURS, scheduler="Euler a", image=image, strength=0.5)
    assert same(result.image, expected[0])
    assert result.parameters["init_images"] is None


@pytest.mark.parametrize("full_res", [True, False])
def test_webuiapi_repaints_what_is_masked(
    server: Server, client: webuiapi.WebUIApi, full_res: bool
) -> None:
    result = client.img2img(
        images=[PHOTO],
        mask_image=MASK,
        **QUICK,
        denoising_strength=0.75,
        inpainting_fill=1,
        inpaint_full_res=full_res,
        inpaint_full_res_padding=8,
    )
    expected = generated(
        server,
        **OURS,
        scheduler="Euler a",
        image=images.base64(PHOTO),
        mask_image=images.base64(MASK),
        mask_blur=4,
        strength=0.75,
        **({"padding_mask_crop": 8} if full_res else {}),
    )
    assert same(result.image, expected[0])


def test_webuiapi_follows_a_control_image(server: Server, client: webuiapi.WebUIApi) -> None:
    unit = webuiapi.ControlNetUnit(
        image=EDGES, module="none", model="control_v11p_sd15_canny [d14c016b]", weight=0.8
    )
    result = client.txt2img(**QUICK, controlnet_units=[unit])
    control = {"type": "canny", "image": images.base64(EDGES), "conditioning_scale": 0.8}
    expected = generated(server, **OURS, scheduler="Euler a", controlnet=control)
    assert same(result.image, expected[0])
    # Calls of webuiapi share their scripts: it must know that there is ControlNet to take it out.
    plain = generated(server, **OURS, scheduler="Euler a")[0]
    assert same(client.txt2img(**QUICK).image, plain)
    assert not same(result.image, plain)


def test_loras_are_named_in_the_prompt(server: Server, client: webuiapi.WebUIApi) -> None:
    prompt = f"{PROMPT} <lora:outline:0.9>"
    result = client.txt2img(**QUICK | {"prompt": prompt})
    expected = generated(server, **OURS | {"prompt": prompt}, scheduler="Euler a")
    assert same(result.image, expected[0])
    assert not same(result.image, generated(server, **OURS, scheduler="Euler a")[0])


def test_webuiapi_sees_progress_and_interrupts(server: Server, client: webuiapi.WebUIApi) -> None:
    results: list[webuiapi.WebUIApiResult] = []
    long = QUICK | {"steps": 150, "batch_size": 4}
    thread = threading.Thread(target=lambda: results.append(client.txt2img(**long)))
    thread.start()
    seen: dict[str, Any] = {}
    give_up = time.monotonic() + 60
    while not seen.get("current_image"):
        assert time.monotonic() < give_up
        seen = client.get_progress()
        time.sleep(0.05)
    assert 0 < seen["progress"] < 1
    assert seen["state"]["job_count"] == 4
    preview = Image.open(BytesIO(base64.b64decode(seen["current_image"])))
    assert preview.format == "PNG" and preview.size == (256, 256)
    assert client.get_progress()["current_image"]
    client.interrupt()
    thread.join(60)
    assert results[0].images == []
    assert "Interrupted" in results[0].info["extra_generation_params"]
    idle = client.get_progress()
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0, 0, None)


def test_librechat_reads_info(server: Server) -> None:
    body = {"prompt": PROMPT, "negative_prompt": "", "cfg_scale": 4.5, "steps": 2}
    answer = server.client.post(
        "/sdapi/v1/txt2img", json=body | {"width": 128, "height": 128}
    ).json()
    info = json.loads(answer["info"])
    assert info["infotexts"][0].startswith(PROMPT)
    assert (info["width"], info["height"]) == (128, 128)
    assert pixels(base64.b64decode(answer["images"][0])).shape == (128, 128, 3)
