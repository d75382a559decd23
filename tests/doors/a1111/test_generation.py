"""txt2img, img2img, progress and interrupts over HTTP: recorded bodies and nonsense.

The images are a fake runner's; test_clients.py has real ones.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx import Response
from PIL import Image

from sdbento.access import entries
from sdbento.doors.a1111 import generation
from sdbento.doors.a1111.failures import ERRORS
from sdbento.settings import Settings
from tests.support import images
from tests.support.fake_server import SOON, FakeServer, fake_server
from tests.support.fakes import expected_pixel

SHAPES = {"/sdapi/": ERRORS}
PHOTO = images.data_uri(images.gradient())


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    settings = Settings(sd_model="shapes", state_dir=tmp_path_factory.mktemp("state"))
    with fake_server(generation.router, error_shapes=SHAPES, settings=settings) as fake:
        yield fake


@contextmanager
def slow_server(folder: Path, **options: Any) -> Iterator[FakeServer]:
    settings = Settings(sd_model="shapes", state_dir=folder, **options)
    with fake_server(
        generation.router, error_shapes=SHAPES, settings=settings, seconds=0.02
    ) as slow:
        yield slow


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[FakeServer]:
    with slow_server(tmp_path, max_queue_size=1, max_batch_size=1) as slow:
        yield slow


def post(fake: FakeServer, path: str = "txt2img", **body: Any) -> dict[str, Any]:
    response = fake.client.post(f"/sdapi/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert set(answer) == {"images", "parameters", "info"}
    return answer


def assert_error(response: Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()
    assert set(error) == {"error", "detail", "body", "errors"}
    for word in words:
        assert word in error["detail"]


# Bodies that clients send: open-webui's routers/images.py, SillyTavern's stable-diffusion.js,
# LibreChat's StableDiffusion.js, SDAI's TextToImageRequest.kt, stable-ui, RisuAI, AI Render.

OPEN_WEBUI = {"prompt": "a cat", "batch_size": 1, "width": 512, "height": 512, "steps": 50}
SILLYTAVERN = {
    "url": "http://host:7860",
    "auth": "user:secret",
    "prompt": "a cat",
    "negative_prompt": "",
    "sampler_name": "DDIM",
    "scheduler": "normal",
    "steps": 20,
    "cfg_scale": 7,
    "width": 512,
    "height": 512,
    "restore_faces": False,
    "enable_hr": True,
    "hr_upscaler": "Latent",
    "hr_scale": 1.0,
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}
SILLYTAVERN_SDCPP = {
    "prompt": "a cat",
    "negative_prompt": "",
    "width": 512,
    "height": 512,
    "steps": 20,
    "cfg_scale": 7,
    "seed": -1,
    "batch_size": 1,
    "sampler_name": "euler_a",
    "scheduler": "karras",
    "clip_skip": -1,
    "model": "shapes",
}
LIBRECHAT = {
    "prompt": "a cat",
    "negative_prompt": "blurry",
    "cfg_scale": 4.5,
    "steps": 22,
    "width": 1024,
    "height": 1024,
}
SDAI = {
    "prompt": "a cat",
    "negative_prompt": "",
    "steps": 20,
    "cfg_scale": 7.0,
    "width": 512,
    "height": 512,
    "batch_size": 1,
    "restore_faces": False,
    "seed": "42",
    "subseed": "",
    "subseed_strength": None,
    "sampler_index": "Euler a",
    "scheduler": None,
    "alwayson_scripts": None,
    "enable_hr": None,
    "hr_upscaler": None,
    "hr_scale": None,
    "override_settings": None,
}
STABLE_UI = {
    "prompt": "a cat",
    "negative_prompt": "",
    "steps": 20,
    "n": 1,
    "sampler_name": "k_euler_a",
    "width": 512,
    "height": 512,
    "cfg_scale": 7,
    "clip_skip": 1,
    "seed": 3,
    "denoising_strength": 0.5,
    "enable_hr": False,
    "scheduler": "karras",
    "init_images": [PHOTO],
    "inpainting_mask_invert": 0,
    "inpainting_fill": 1,
}
RISUAI = {
    "width": 512,
    "height": 768,
    "seed": -1,
    "steps": 20,
    "cfg_scale": 7,
    "prompt": "a cat",
    "negative_prompt": "",
    "sampler_name": "DPM++ 2M Karras",
    "enable_hr": False,
    "denoising_strength": 0.7,
    "hr_scale": 1.25,
    "hr_upscaler": "Latent",
}
AI_RENDER = {
    "init_images": [PHOTO],
    "denoising_strength": 0.4,
    "sampler_index": "DPM++ 2S a Karras",
    "prompt": "a cat",
    "negative_prompt": "ugly",
    "width": 512,
    "height": 512,
    "seed": 7,
    "cfg_scale": 7.0,
    "steps": 20,
    "alwayson_scripts": {"controlnet": {"args": []}},
}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("txt2img", OPEN_WEBUI),
        ("txt2img", SILLYTAVERN),
        ("txt2img", SILLYTAVERN_SDCPP),
        ("txt2img", LIBRECHAT),
        ("txt2img", SDAI),
        ("img2img", SDAI | {"init_images": [PHOTO], "mask": None, "include_init_images": False}),
        ("txt2img", STABLE_UI),
        ("img2img", STABLE_UI),
        ("txt2img", RISUAI),
        ("img2img", AI_RENDER),
    ],
)
def test_what_clients_send(fake: FakeServer, path: str, body: dict[str, Any]) -> None:
    answer = post(fake, path, **body)
    info = json.loads(answer["info"])
    [image] = answer["images"]
    assert Image.open(BytesIO(base64.b64decode(image, validate=True))).format == "PNG"
    assert info["infotexts"][0].startswith("a cat")
    assert info["seed"] == info["all_seeds"][0]
    assert (info["width"], info["height"]) == (body["width"], body["height"])
    assert isinstance(info["subseed"], int) and len(info["all_subseeds"]) == 1
    assert "secret" not in json.dumps(answer)


def test_prompts_come_back_as_they_were(fake: FakeServer) -> None:
    prompt = "a cat &style=anime, what?x=y, #a=1 dog"
    answer = post(fake, prompt=prompt, negative_prompt=prompt, steps=3)
    info = json.loads(answer["info"])
    assert info["all_prompts"] == info["all_negative_prompts"] == [prompt]
    assert answer["parameters"]["prompt"] == prompt
    assert info["infotexts"][0].startswith(f"{prompt}\nNegative prompt: {prompt}\n")


def test_info_has_every_key_of_the_web_ui(fake: FakeServer) -> None:
    body: dict[str, Any] = {"prompt": "a", "negative_prompt": "b", "seed": 4, "batch_size": 2}
    info = json.loads(post(fake, **body, steps=3, restore_faces=True, width=100)["info"])
    assert info.pop("job_timestamp").isdigit()
    assert info.pop("version").startswith("sdbento ")
    assert [text.splitlines()[0] for text in info.pop("infotexts")] == ["a", "a"]
    assert info == {
        "prompt": "a",
        "all_prompts": ["a", "a"],
        "negative_prompt": "b",
        "all_negative_prompts": ["b", "b"],
        "seed": 4,
        "all_seeds": [4, 5],
        "subseed": -1,
        "all_subseeds": [-1, -1],
        "subseed_strength": 0,
        "width": 104,
        "height": 512,
        "sampler_name": "Euler",
        "cfg_scale": 7.0,
        "steps": 3,
        "batch_size": 2,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": "shapes",
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": None,
        "extra_generation_params": {
            "Schedule type": "Automatic",
            "Changed": "width 100 -> 104",
            "Not applied": "restore_faces",
        },
        "index_of_first_image": 0,
        "styles": [],
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
    }


def test_more_images_than_one_request_of_ours_has(fake: FakeServer) -> None:
    answer = post(fake, prompt="x", seed=100, batch_size=6, n_iter=6, steps=2)
    seeds = json.loads(answer["info"])["all_seeds"]
    assert seeds == [*range(100, 136)]
    pixels = [
        Image.open(BytesIO(base64.b64decode(one))).getpixel((0, 0)) for one in answer["images"]
    ]
    assert pixels == [expected_pixel(seed, 2) for seed in seeds]


def test_a_drawn_seed_is_one_seed(fake: FakeServer) -> None:
    info = json.loads(post(fake, prompt="x", batch_size=20, steps=1)["info"])
    assert info["all_seeds"] == [*range(info["seed"], info["seed"] + 20)]


def test_no_images_where_none_are_wanted(fake: FakeServer) -> None:
    answer = post(fake, prompt="x", steps=1, send_images=False)
    assert answer["images"] == [] and len(json.loads(answer["info"])["infotexts"]) == 1


def test_the_body_is_repeated_without_its_images(fake: FakeServer) -> None:
    script = {"controlnet": {"args": [{"enabled": False, "image": PHOTO * 9, "weight": 0.5}]}}
    body = {"prompt": "x", "steps": 1, "init_images": [PHOTO], "alwayson_scripts": script}
    parameters = post(fake, "img2img", **body)["parameters"]
    assert (parameters["prompt"], parameters["init_images"], parameters["mask"]) == (
        "x",
        None,
        None,
    )
    [unit] = parameters["alwayson_scripts"]["controlnet"]["args"]
    assert unit == {"enabled": False, "image": None, "weight": 0.5}
    parameters = post(fake, "img2img", **body, include_init_images=True)["parameters"]
    assert parameters["init_images"] == [PHOTO]


@pytest.mark.parametrize(
    ("title", "status"),
    [
        ("shapes", 200),
        ("Shapes.safetensors [0123abcdef]", 200),
        ("shapes.ckpt", 200),
        ("None", 200),
        ("no such.safetensors [0123abcdef]", 404),
        ("\ud800", 422),
        ("../../etc/passwd", 404),
    ],
)
def test_models_by_their_titles(fake: FakeServer, title: str, status: int) -> None:
    body = {"prompt": "x", "steps": 1, "override_settings": {"sd_model_checkpoint": title}}
    response = fake.client.post("/sdapi/v1/txt2img", content=json.dumps(body))
    assert response.status_code == status, response.text
    if status != 200:
        assert_error(response, status)


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        ("{", 400, "JSON"),
        ("", 400, "JSON object"),
        ("null", 400, "JSON object"),
        ("[]", 400, "JSON object"),
        ("3", 400, "JSON object"),
        ('{"prompt": ["x"]}', 422, "prompt"),
        ('{"width": "abc"}', 422, "width"),
        ('{"cfg_scale": NaN}', 422, "cfg_scale"),
        ('{"sampler_name": "no such"}', 400, "Sampler not found"),
        ('{"script_name": "no such"}', 422, "Script 'no such' not found"),
        ('{"batch_size": 64, "n_iter": 2}', 422, "at most 64"),
        ('{"refiner_checkpoint": "shapes"}', 422, "SDXL"),
        ('{"prompt": "<lora:no such:1>"}', 422, "no such"),
        ('{"width": 4096, "height": 4096}', 422, "pixels"),
    ],
)
def test_errors_have_the_web_uis_shape(
    fake: FakeServer, content: str, status: int, words: str
) -> None:
    assert_error(fake.client.post("/sdapi/v1/txt2img", content=content), status, words)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 404, "Init image not found"),
        ({"init_images": ["no base64!"]}, 422, "image"),
        ({"init_images": [""]}, 422, "image"),
        ({"init_images": [None]}, 422, "init_images"),
        ({"init_images": PHOTO}, 422, "init_images"),
        ({"init_images": [PHOTO], "mask": "no base64!"}, 422, "mask"),
        ({"init_images": [PHOTO], "resize_mode": 4}, 422, "resize_mode"),
        ({"init_images": ["http://127.0.0.1:1/"]}, 422, "image"),
    ],
)
def test_errors_of_images(fake: FakeServer, body: dict[str, Any], status: int, words: str) -> None:
    assert_error(fake.client.post("/sdapi/v1/img2img", json=body), status, words)


def test_other_methods_and_routes(fake: FakeServer) -> None:
    assert_error(fake.client.get("/sdapi/v1/txt2img"), 405, "POST")
    assert_error(fake.client.post("/sdapi/v1/no-such"), 404)


@pytest.mark.parametrize(
    "value",
    ["[" * 50 + "]" * 50, '{"a": 1e999}', '{"a": NaN}', '"\\ud800"', '{"\\ud800": 1}', "[[1]]"],
)
def test_anything_may_be_in_fields_that_are_not_looked_at(fake: FakeServer, value: str) -> None:
    ignored = ("unknown", "styles", "script_args", "s_churn")
    script = f'"alwayson_scripts": {{"x": {{"args": [{value}]}}}}'
    for field in (*(f'"{name}": {value}' for name in ignored), script):
        content = f'{{"prompt": "x", "steps": 1, {field}}}'
        response = fake.client.post("/sdapi/v1/txt2img", content=content)
        assert response.status_code == 200, response.text
        assert "NaN" not in response.text
        response.json()


# Progress and interrupts

IDLE = {
    "progress": 0.0,
    "eta_relative": 0.0,
    "state": {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": 0,
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    },
    "current_image": None,
    "textinfo": None,
}


def progress(fake: FakeServer, **query: Any) -> dict[str, Any]:
    answer: dict[str, Any] = fake.client.get("/sdapi/v1/progress", params=query).json()
    return answer


def until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def in_background(fake: FakeServer, **body: Any) -> Callable[[], Response]:
    answers: list[Response] = []

    def work() -> None:
        answers.append(fake.client.post("/sdapi/v1/txt2img", json={"prompt": "x", **body}))

    thread = threading.Thread(target=work)
    thread.start()

    def answer() -> Response:
        thread.join(SOON)
        return answers[0]

    return answer


def test_progress_is_nothing_when_nothing_is_under_way(fake: FakeServer) -> None:
    post(fake, prompt="x", steps=1)
    assert progress(fake) == IDLE
    assert progress(fake, skip_current_image="true") == IDLE
    for path in ("interrupt", "skip"):
        assert fake.client.post(f"/sdapi/v1/{path}").json() == {}


@pytest.mark.parametrize("path", ["interrupt", "skip"])
def test_an_interrupted_call_answers_with_what_is_finished(slow: FakeServer, path: str) -> None:
    answer = in_background(slow, steps=150, seed=1)
    until(lambda: progress(slow)["state"]["sampling_step"] > 0)
    state = progress(slow)
    assert 0 < state["progress"] < 1 and state["eta_relative"] > 0
    assert (state["state"]["job"], state["state"]["job_count"]) == ("txt2img", 1)
    assert state["state"]["sampling_steps"] == 150
    assert slow.client.post(f"/sdapi/v1/{path}").status_code == 200
    response = answer()
    assert response.status_code == 200 and response.json()["images"] == []
    info = json.loads(response.json()["info"])
    assert info["extra_generation_params"]["Interrupted"] == "0 of 1 images were finished"
    assert (info["seed"], info["infotexts"]) == (1, [])
    assert progress(slow) == IDLE


def test_keys_see_and_interrupt_their_own_calls_only(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    keys = [str(entries.add(file, name)) for name in ("ann", "bob")]
    with slow_server(tmp_path / "state", api_keys=file) as slow:
        assert_error(slow.client.get("/sdapi/v1/progress"), 401)
        slow.client.auth = ("anyone", keys[0])  # Basic, as A1111's clients do
        answer = in_background(slow, steps=150)
        until(lambda: progress(slow)["state"]["sampling_step"] > 0)
        with httpx.Client(base_url=slow.url, auth=("", keys[1]), trust_env=False) as bob:
            assert bob.get("/sdapi/v1/progress").json() == IDLE
            for path in ("interrupt", "skip"):
                assert bob.post(f"/sdapi/v1/{path}").json() == {}
        state = progress(slow)["state"]
        assert (state["job_count"], state["interrupted"]) == (1, False)
        slow.client.post("/sdapi/v1/interrupt")
        assert answer().json()["images"] == []


def test_a_full_queue_is_429_with_a_time_to_retry(slow: FakeServer) -> None:
    answers = [in_background(slow, steps=150) for _ in range(2)]
    until(lambda: progress(slow)["state"]["job_count"] == 2)
    refused = slow.client.post("/sdapi/v1/txt2img", json={"prompt": "x"})
    assert_error(refused, 429, "queue is full")
    assert int(refused.headers["retry-after"]) >= 1
    slow.client.post("/sdapi/v1/interrupt")
    for answer in answers:
        answer()


def test_a_call_of_many_images_takes_one_place_in_the_queue(tmp_path: Path) -> None:
    settings = Settings(sd_model="shapes", state_dir=tmp_path, max_queue_size=1, max_batch_size=1)
    with fake_server(generation.router, error_shapes=SHAPES, settings=settings) as small:
        assert len(post(small, prompt="x", steps=1, batch_size=64)["images"]) == 64


def test_more_images_than_a_key_may_ever_have_are_403(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    key = str(entries.add(file, "ann", images_at_once=16))
    settings = Settings(sd_model="shapes", state_dir=tmp_path / "state", api_keys=file)
    with fake_server(generation.router, error_shapes=SHAPES, settings=settings) as fake:
        fake.client.auth = ("", key)
        body: dict[str, Any] = {"prompt": "x", "steps": 1}
        refused = fake.client.post("/sdapi/v1/txt2img", json=body | {"batch_size": 17})
        assert_error(refused, 403, "16 images at once; given: 17")
        assert len(post(fake, **body, batch_size=16)["images"]) == 16


def test_a_call_is_seen_and_interrupted_while_its_model_is_looked_up(
    slow: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_model, asked, go_on = slow.app.find_model, threading.Event(), threading.Event()

    async def find_slowly(name: str | None = None) -> Any:
        asked.set()
        await asyncio.to_thread(go_on.wait, SOON)
        return await find_model(name)

    monkeypatch.setattr(slow.app, "find_model", find_slowly)
    answer = in_background(slow, steps=150)
    assert asked.wait(SOON)
    state = progress(slow)
    assert (state["progress"], state["state"]["job_count"]) == (generation.LEAST, 1)
    slow.client.post("/sdapi/v1/interrupt")
    go_on.set()
    assert answer().json()["images"] == []


def test_a_client_that_leaves_stops_its_work(slow: FakeServer) -> None:
    with pytest.raises(Exception, match="timed out"):
        slow.client.post("/sdapi/v1/txt2img", json={"prompt": "x", "steps": 150}, timeout=0.5)
    until(lambda: progress(slow) == IDLE)
