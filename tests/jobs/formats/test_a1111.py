"""Inputs that are calls of AUTOMATIC1111's API, as clients of two RunPod workers send them."""

from __future__ import annotations

from typing import Any

import pytest

from sdbento.errors import InvalidParameter
from sdbento.jobs.formats.a1111 import OURS, TELLING, Call, call_of
from sdbento.jobs.formats.inputs import read_input, settle_seed
from sdbento.jobs.formats.native import JobInput

# test_input.json of runpod-workers/worker-a1111.
BODY: dict[str, Any] = {
    "prompt": "a photograph of an astronaut riding a horse",
    "negative_prompt": "text, watermark, blurry, low quality",
    "steps": 25,
    "cfg_scale": 7,
    "width": 512,
    "height": 512,
    "sampler_name": "DPM++ 2M Karras",
}

# Fields that no call has, with values that requests of ours take.
VALID: dict[str, Any] = {"stream": True, "return": "full", "allow_jpeg": True}


def named(endpoint: Any = "/sdapi/v1/txt2img", method: Any = "POST", **payload: Any) -> Any:
    return {"api": {"method": method, "endpoint": endpoint}, "payload": payload}


def test_a_body_of_the_web_ui_is_a_call() -> None:
    assert call_of(BODY) == Call("POST", "/sdapi/v1/txt2img", BODY)
    with_image = {**BODY, "init_images": ["AAAA"], "denoising_strength": 0.5}
    assert call_of(with_image) == Call("POST", "/sdapi/v1/img2img", with_image)


@pytest.mark.parametrize("field", sorted(TELLING))
def test_one_field_of_the_web_ui_is_enough(field: str) -> None:
    assert call_of({"prompt": "x", field: 1}) is not None


def test_what_could_be_both_is_ours() -> None:
    shared = {"prompt": "x", "negative_prompt": "y", "width": 512, "height": 512, "seed": 3}
    assert call_of(shared) is None
    assert isinstance(read_input(shared), JobInput)
    assert not OURS & TELLING


def test_a_mixture_is_refused_with_the_names_to_use() -> None:
    with pytest.raises(InvalidParameter, match="it is called num_inference_steps here"):
        read_input({"prompt": "x", "steps": 20, "guidance_scale": 7})


@pytest.mark.parametrize(
    "field", ["stream", "return", "allow_jpeg", "image_url", "high_noise_frac", "hires"]
)
def test_no_field_that_a_call_has_not_is_lost(field: str) -> None:
    with pytest.raises(InvalidParameter, match="denoising_strength is not a known field"):
        read_input({"prompt": "x", "denoising_strength": 0.5, field: VALID.get(field)})
    with pytest.raises(InvalidParameter, match="does not go together with api") as caught:
        read_input({**named(**BODY), field: VALID.get(field)})
    assert caught.value.param == field


@pytest.mark.parametrize(
    "endpoint", ["/sdapi/v1/txt2img", "sdapi/v1/txt2img", "/sdapi/v1/txt2img/"]
)
def test_a_named_call_is_taken_as_it_is(endpoint: str) -> None:
    assert call_of(named(endpoint, steps=4)) == Call("POST", "/sdapi/v1/txt2img", {"steps": 4})


def test_a_call_needs_no_payload() -> None:
    given = {"api": {"method": "GET", "endpoint": "/controlnet/model_list"}}
    assert call_of(given) == Call("GET", "/controlnet/model_list", {})


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"api": None}, "api"),
        ({"api": "x", "payload": {}}, "api"),
        ({"api": {}}, "api.method"),
        (named(method="DELETE"), "api.method"),
        (named(method=["GET"]), "api.method"),
        (named(endpoint=None), "api.endpoint"),
        (named(endpoint=5), "api.endpoint"),
        (named(endpoint="v1/sync"), "api.endpoint"),
        (named(endpoint="/run"), "api.endpoint"),
        (named(endpoint="/sdapi/v1/../../run"), "api.endpoint"),
        (named(endpoint="/sdapi/v1/%2e%2e/run"), "api.endpoint"),
        (named(endpoint="//host.example/sdapi/v1/txt2img"), "api.endpoint"),
        (named(endpoint="http://host.example/sdapi/v1/txt2img"), "api.endpoint"),
        (named(endpoint="/sdapi/v1/txt2img?x=1"), "api.endpoint"),
        (named(endpoint="/sdapi/v1/txt2img\n"), "api.endpoint"),
        ({**named(), "payload": [1]}, "payload"),
    ],
)
def test_what_is_no_call_of_that_api_is_refused(given: Any, param: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        read_input(given)
    assert caught.value.param == param


@pytest.mark.parametrize("seed", [{}, {"seed": -1}, {"seed": None}, {"seed": ""}, {"seed": "-1"}])
def test_the_seed_of_a_call_is_chosen_once(seed: dict[str, Any]) -> None:
    bodies = [settle_seed({**BODY, **seed}) for _ in range(3)]
    assert len({body["seed"] for body in bodies}) == 3
    payloads = [settle_seed(named(**BODY, **seed))["payload"] for _ in range(3)]
    assert len({payload["seed"] for payload in payloads}) == 3
    assert settle_seed(bodies[0]) == bodies[0]


def test_only_what_makes_images_gets_a_seed() -> None:
    given = named("/sdapi/v1/options", sd_model_checkpoint="x")
    assert settle_seed(given) == given


def test_the_whole_answer_is_the_output() -> None:
    call = Call("POST", "/sdapi/v1/txt2img", {})
    answer = {"images": ["AAAA"], "parameters": {"steps": 4}, "info": "{}"}
    assert call.result(answer).output() == answer
    assert call.result(answer).write(["https://a.example/b"], [])["images"] == [
        "https://a.example/b"
    ]
    enlarged = call.result({"image": "AAAA", "html_info": ""})
    assert (enlarged.images, enlarged.output()["image"]) == (["AAAA"], "AAAA")
    assert enlarged.write(["https://a.example/b"], []) == {
        "image": "https://a.example/b",
        "html_info": "",
    }
    for other in ([{"name": "Euler"}], None, "x", {"images": None}, {"image": None}):
        assert call.result(other).output() == other
        assert call.result(other).images == []
