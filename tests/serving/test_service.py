"""End-to-end tests: a real `bentoml serve` on `shapes`, over HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image
from starlette.requests import Request

from sdbento.doors.bentoml.labels import BENTOML, OTHERS
from sdbento.images import infotext
from sdbento.images.metadata import read_metadata
from tests.support.server import (
    QUICK,
    Server,
    alike,
    assert_error,
    generated,
    pixels,
    post,
    serving,
)


def test_a_prompt_becomes_an_image_of_what_it_asks_for(server: Server) -> None:
    prompt = "a large red circle on a blue background"
    image = generated(server, prompt=prompt, seed=1)[0]
    assert image.shape == (128, 128, 3)
    red, green, blue = image[64, 64]
    assert red > 150 > max(green, blue)
    red, green, blue = image[4, 4]
    assert blue > 150 > max(red, green)


def test_the_response_holds_all_that_reproduces_the_image(server: Server) -> None:
    first = post(server, prompt="a green star", num_images=2, num_inference_steps=5).json()
    assert first["seeds"] == [first["seeds"][0], first["seeds"][0] + 1]
    assert first["timings"]["total"] >= first["timings"]["denoising"] > 0
    for seed, image in zip(first["seeds"], first["images"], strict=True):
        [again] = generated(server, **(first["parameters"] | {"seed": seed}))
        assert alike(again, pixels(base64.b64decode(image)))


def test_the_image_carries_its_parameters(server: Server) -> None:
    response = post(server, "/txt2img", **QUICK)
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-seed"] == "7"
    embedded = read_metadata(response.content)
    assert embedded.parameters is not None and embedded.parameters["seed"] == 7
    assert post(server, **QUICK).json()["infotexts"] == [embedded.infotext]
    assert infotext.read(embedded.infotext or "")["Sampler"] == "DDIM"  # the model's own
    for name, kind in (("jpeg", "JPEG"), ("webp", "WEBP")):
        response = post(server, "/txt2img", output_format=name, **QUICK)
        assert response.headers["content-type"] == f"image/{name}"
        assert Image.open(BytesIO(response.content)).format == kind
        assert read_metadata(response.content) == embedded


def test_a_stream_reports_the_queue_steps_previews_and_the_end(server: Server) -> None:
    with server.client.stream(
        "POST", "/generate_stream", json={**QUICK, "preview_every": 2}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data")]
    names = [event["event"] for event in events]
    assert names[0] == "queued"
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4]
    preview = next(event for event in events if event["event"] == "preview")
    assert Image.open(BytesIO(base64.b64decode(preview["preview"]))).size == (256, 256)
    assert names[-1] == "done"
    solo = generated(server, **QUICK)[0]
    streamed = pixels(base64.b64decode(events[-1]["response"]["images"][0]))
    assert alike(solo, streamed)


def test_models_and_samplers_are_listed(server: Server) -> None:
    models = {model["name"]: model for model in server.client.get("/models").json()["models"]}
    assert models["shapes"]["loaded"]
    assert models["shapes"]["attention"] == "SDPA"
    assert models["shapes"]["default"]
    assert "stabilityai/stable-diffusion-xl-base-1.0" in models
    samplers = {sampler["name"] for sampler in server.client.get("/samplers").json()["samplers"]}
    assert len(samplers) >= 12


def test_metrics_need_no_room_on_the_disk(server: Server) -> None:
    """A write to a mapped file on a full disk would kill the process."""
    generated(server, **QUICK)
    metrics = server.client.get("/metrics").text
    assert 'bentoml_service_request_total{endpoint="/generate"' in metrics
    assert "sdbento_queue_depth 0.0" in metrics
    assert list((server.log.parent / "bentoml").rglob("*.db")) == []


def test_the_server_is_alive_and_ready(server: Server) -> None:
    assert server.client.get("/livez").status_code == 200
    assert server.client.get("/readyz").status_code == 200
    assert server.client.get("/ping").status_code == 200
    generated(server, **QUICK)
    assert "sdbento_queue_depth" in server.client.get("/metrics").text


def test_metrics_do_not_grow_with_what_strangers_ask_for(server: Server) -> None:
    paths = ["/{}", "/v2/{}/status/{}", "/v2/{}/{}", "/sdapi/v1/{}", "/v1/images/files/{}"]
    paths += ["/status/{}", "/livez/{}", "/metrics/{}", "/models?{}", "/%{}", "//{}"]
    paths += ["/web/{}/{}", "/v1/models/{}"]
    for i in range(10, 15):
        for path in paths:
            for method in ("GET", "HEAD", "OPTIONS", "POST", "DELETE", "PROPFIND"):
                server.client.request(method, path.format(i, i))
    text = server.client.get("/metrics").text
    endpoints = set(re.findall(r'endpoint="([^"]*)"', text))
    routes = set(server.client.get("/docs.json").json()["paths"])
    routes |= {f"/v2/{{endpoint_id}}{route}" for route in routes}
    assert endpoints <= routes | {*BENTOML, OTHERS, "/docs"}


def test_credentials_in_urls_are_repeated_nowhere(server: Server) -> None:
    url = "https://u:SECRET@h.example/ink.safetensors?token=SECRET"
    asked = QUICK | {"prompt": f"a circle, {url}", "negative_prompt": url, "num_inference_steps": 1}
    answers = [post(server, **asked)]
    assert answers[0].json()["parameters"]["negative_prompt"] == "https://h.example/ink.safetensors"
    for named in ({"model": url}, {"lora": {"model_id": url}}, {"scheduler": url}, {"image": url}):
        answers.append(post(server, **QUICK | named))
        assert answers[-1].status_code in (404, 422)
    job = {"input": QUICK | {"prompt": url, "num_inference_steps": 1, "return": "full"}}
    answers.append(server.client.post("/runsync", json=job))
    assert answers[-1].json()["status"] == "COMPLETED"
    a1111 = {"prompt": url, "steps": 1, "width": 64, "height": 64}
    answers.append(server.client.post("/sdapi/v1/txt2img", json=a1111))
    assert answers[-1].status_code == 200
    for answer in answers:
        assert "SECRET" not in answer.text
    metadata = read_metadata(base64.b64decode(answers[0].json()["images"][0]))
    assert "SECRET" not in str(metadata)
    assert "SECRET" not in server.log.read_text()


MIX_SAMPLERS = ["DDIM", "Euler", "Euler a", "DPM++ 2M Karras", "UniPC", "DPM++ 2M SDE", "Heun"]


def mixed_request(i: int) -> dict[str, Any]:
    side = 192 if i % 5 == 4 else 128
    return {
        "prompt": f"a {['red', 'green', 'blue', 'yellow'][i % 4]} square",
        "scheduler": MIX_SAMPLERS[i % len(MIX_SAMPLERS)],
        "num_inference_steps": 4 + i % 9,
        "guidance_scale": [1.0, 3.0, 7.5][i % 3],
        "guidance_rescale": 0.7 if i % 4 == 3 else 0.0,
        "seed": i,
        "width": side,
        "height": side,
    }


def test_32_concurrent_mixed_requests_each_equal_their_solo_run(server: Server) -> None:
    requests = [mixed_request(i) for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda fields: generated(server, **fields)[0], requests))
    for fields, image in zip(requests, together, strict=True):
        alone = generated(server, **fields)[0]
        assert alike(alone, image), fields


BAD = [
    ({}, 422, ["prompt is required"], "prompt"),
    ({"prompt": 5}, 422, ["prompt", "string", "5"], "prompt"),
    ({"prompt": "x", "stepz": 5}, 422, ["stepz", "num_inference_steps"], "stepz"),
    ({"prompt": "x", "width": 513}, 422, ["width", "multiple of 8", "513"], "width"),
    ({"prompt": "x", "width": "512"}, 422, ["width", "integer", "'512'"], "width"),
    ({"prompt": "x", "num_inference_steps": 0}, 422, ["greater than or equal to 1", "0"], None),
    ({"prompt": "x", "num_inference_steps": 999}, 422, ["less than or equal to 150", "999"], None),
    ({"prompt": "x", "guidance_scale": -1}, 422, ["guidance_scale", "0", "-1"], None),
    ({"prompt": "x", "num_images": 17}, 422, ["num_images", "16", "17"], None),
    ({"prompt": "x", "seed": 2**63}, 422, ["seed"], "seed"),
    ({"prompt": "x", "width": 4096, "height": 4096}, 422, ["4194304 pixels", "4096"], "width"),
    ({"prompt": "x", "scheduler": "Eulr a"}, 422, ["Eulr a", "Euler a"], "scheduler"),
    ({"prompt": "x", "model": "shape"}, 404, ["shape", "shapes"], "model"),
    ({"prompt": "x", "sigmas": "cosine"}, 422, ["sigmas", "karras", "cosine"], "sigmas"),
]


@pytest.mark.parametrize(("fields", "status", "words", "param"), BAD)
def test_a_bad_field_gets_the_right_status_and_a_message_that_helps(
    server: Server, fields: dict[str, Any], status: int, words: list[str], param: str | None
) -> None:
    for path in ("/generate", "/txt2img", "/generate_stream"):
        assert_error(post(server, path, **fields), status, *words, param=param)


RAW = [
    (b"{", 400, "not JSON"),
    (b"", 400, "not JSON"),
    (b"[1]", 400, "must be a JSON object"),
    (b'{"prompt": "x", "guidance_scale": NaN}', 422, "guidance_scale"),
    (b'{"prompt": "x", "guidance_scale": 1e999}', 422, "guidance_scale"),
    (b'{"prompt": "\xff"}', 400, "not JSON"),
    (b'{"prompt": "' + b"x" * 20_000 + b'"}', 422, "10000 characters"),
    (b'{"prompt": "' + b"x" * 34_000_000 + b'"}', 413, "33554432 bytes"),
]


@pytest.mark.parametrize(("body", "status", "word"), RAW, ids=range(len(RAW)))
def test_a_broken_body_gets_the_right_status(
    server: Server, body: bytes, status: int, word: str
) -> None:
    response = server.client.post("/generate", content=body)
    assert_error(response, status, word)
    assert len(response.content) < 2000


def test_a_body_needs_no_content_type(server: Server) -> None:
    response = server.client.post(
        "/txt2img",
        content=json.dumps(QUICK),
        headers={"Content-Type": "application/x-www-form-urlencoded"},
    )
    assert response.status_code == 200


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of importing BentoML
async def test_nothing_is_kept_of_an_answered_request() -> None:
    """By default BentoML starts a timer per request, which keeps the request for an hour."""
    from service import StableDiffusion

    service: Any = StableDiffusion
    transport = httpx.ASGITransport(app=service.to_asgi())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/nowhere")).status_code == 404
    loop: Any = asyncio.get_running_loop()
    assert [timer for timer in loop._scheduled if timer.when() > loop.time() + 60] == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of importing BentoML
async def test_a_body_is_parsed_once() -> None:
    """By default BentoML parses it a second time."""
    from sdbento.doors.http.guard import REQUEST
    from service import StableDiffusion

    service: Any = StableDiffusion
    parsed = object()
    for endpoint in service.apis.values():
        request = Request({"type": "http", REQUEST: parsed})
        assert await endpoint.input_spec.from_http_request(request, None) is parsed


def test_routes_that_do_not_exist_and_wrong_methods_have_the_one_error_shape(
    server: Server,
) -> None:
    assert_error(server.client.get("/nothing"), 404, "there is no /nothing")
    assert_error(server.client.post("/nothing"), 404, "there is no /nothing")
    response = server.client.get("/generate")
    assert_error(response, 405, "/generate takes POST, not GET")
    assert response.headers["Allow"] == "POST"
    assert_error(server.client.delete("/models"), 405, "/models takes ", "GET", "not DELETE")
    assert_error(post(server, "/txt2img", num_images=2, **QUICK), 422, "/generate", "2")


def test_a_request_whose_timeout_cannot_be_met_is_refused_at_once(server: Server) -> None:
    started = time.monotonic()
    response = post(server, prompt="x", num_inference_steps=150, timeout=0.05)
    assert_error(response, 504, "timeout", param="timeout")
    assert time.monotonic() - started < 5


def test_a_pause_of_the_process_in_the_first_step_of_a_size_refuses_no_request(
    server: Server,
) -> None:
    size = {"prompt": "x", "width": 320, "height": 320, "guidance_scale": 1}
    stopped = psutil.Process(server.process.pid).children(recursive=True)
    one_step = {**size, "num_inference_steps": 1}
    with server.client.stream("POST", "/generate_stream", json=one_step) as stream:
        lines = stream.iter_lines()
        next(line for line in lines if '"eta"' in line and '"eta": null' not in line)
        time.sleep(0.1)  # the prompt is encoded, the step runs
        try:
            for process in stopped:
                process.suspend()
            time.sleep(3)
        finally:
            for process in stopped:
                process.resume()
        assert any('"done"' in line for line in lines)
    generated(server, **size, num_inference_steps=6, timeout=12)


def test_a_client_that_leaves_stops_its_work(server: Server) -> None:
    long = {"prompt": "x", "num_inference_steps": 150, "num_images": 16}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/generate", json=long, timeout=0.7, trust_env=False)
    with httpx.stream(
        "POST", f"{server.url}/generate_stream", json=long, timeout=30, trust_env=False
    ) as stream:
        next(stream.iter_lines())
    started = time.monotonic()
    generated(server, **QUICK)
    assert time.monotonic() - started < 10  # 4800 steps would take longer
    log = server.log.read_text()
    for path in ("/generate", "/generate_stream"):
        assert f"the client of {path!r} went away" in log


def test_a_full_queue_answers_429_with_retry_after_and_loses_no_request(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("small")
    with serving(folder, MAX_QUEUE_SIZE="2", MAX_BATCH_SIZE="1") as small:
        early = post(small, **QUICK) if _answers(small) else None
        small.wait_until_ready()
        if early is not None:  # asked while the model was loading: it waited for it
            assert early.status_code == 200
        with ThreadPoolExecutor(12) as pool:
            fields = {**QUICK, "num_inference_steps": 30}
            answers = list(pool.map(lambda _: post(small, **fields), range(12)))
        assert {answer.status_code for answer in answers} == {200, 429}
        assert sum(answer.status_code == 200 for answer in answers) >= 3
        for answer in answers:
            if answer.status_code == 429:
                assert_error(answer, 429, "MAX_QUEUE_SIZE=2")
                assert int(answer.headers["retry-after"]) >= 1
        _stop_while_busy(small)


def _answers(server: Server) -> bool:
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        try:
            return server.client.get("/livez").status_code == 200
        except httpx.TransportError:
            time.sleep(0.05)
    return False


def _stop_while_busy(server: Server) -> None:
    """SIGTERM while a request runs: it is finished, then the server exits by itself.

    Clients that wait for a job get its status at once; it continues after the server's restart.
    """
    long = {"input": {**QUICK, "num_inference_steps": 150, "num_images": 8}}
    with ThreadPoolExecutor(2) as clients:
        asking = clients.submit(post, server, **{**QUICK, "num_inference_steps": 60})
        waiting = clients.submit(post, server, "/runsync?wait=300000", **long)
        time.sleep(0.5)
        server.process.terminate()
        assert asking.result(30).status_code == 200
        assert waiting.result(30).json()["status"] == "IN_PROGRESS"
    server.process.wait(timeout=30)
