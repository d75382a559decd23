"""The routes on one-pixel images: URLs, streams, models, and what is sent that makes no sense."""

from __future__ import annotations

import hashlib
import json
import threading
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import pytest
from httpx2 import Response
from PIL import Image
from starlette.testclient import TestClient

from sdbento.app import App
from sdbento.doors.openai import edits
from sdbento.doors.openai.files import PUBLIC_PREFIX
from sdbento.engine.trajectory import Trajectory
from sdbento.errors import OutOfMemory, Overloaded
from tests.doors.openai.conftest import Serve
from tests.support.fakes import FakeRunner

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
VARIATIONS = "/v1/images/variations"
PATHS = [GENERATIONS, EDITS, VARIATIONS]


def png(mode: str = "RGB", color: Any = "red", size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def sdk(client: TestClient) -> openai.OpenAI:
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="any", max_retries=0, http_client=client
    )


def assert_refused(response: Response, status: int, param: str | None, *words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    for word in words:
        assert word in error["message"]


def events(response: Response) -> list[tuple[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for text in response.text.strip().split("\n\n"):
        name, data = text.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_an_answer_has_all_that_openais_has(client: TestClient) -> None:
    response = client.post(GENERATIONS, json={"prompt": "a red, red circle", "n": 2, "seed": 7})
    answer = response.json()
    assert isinstance(answer.pop("created"), int)
    data = answer.pop("data")
    assert [set(image) for image in data] == [{"b64_json"}] * 2
    assert answer == {
        "background": "opaque",
        "output_format": "png",
        "quality": "medium",
        "size": "1x1",
        "usage": {
            "input_tokens": 5,
            "input_tokens_details": {"text_tokens": 5, "image_tokens": 0},
            "output_tokens": 0,
            "total_tokens": 5,
        },
    }
    assert response.headers["x-sdbento-model"] == "shapes"
    assert response.headers["x-seed"] == "7"
    assert "x-sdbento-warnings" not in response.headers


def test_what_is_not_as_asked_is_told_in_a_header(client: TestClient) -> None:
    body = {"prompt": "x", "model": "näme\r\nX-Evil: 1", "size": "65x65"}
    response = client.post(GENERATIONS, json=body)
    assert response.status_code == 200
    assert "x-evil" not in response.headers
    replaced, rounded = json.loads(response.headers["x-sdbento-warnings"])
    assert "näme" in replaced and "shapes was used" in replaced
    assert rounded == "size 65x65 was rounded to 64x64"


@pytest.mark.parametrize("model", ["a/b", "/etc/passwd", "../x.safetensors", "\0/\n", " / "])
def test_paths_and_hub_ids_that_are_nothing_mean_the_default_model(
    client: TestClient, model: str
) -> None:
    response = client.post(GENERATIONS, json={"prompt": "x", "model": model})
    assert response.status_code == 200, response.text
    assert response.headers["x-sdbento-model"] == "shapes"
    assert "shapes was used" in response.headers["x-sdbento-warnings"]


@pytest.mark.parametrize(
    ("output_format", "suffix", "kind"),
    [("png", ".png", "image/png"), ("jpg", ".jpg", "image/jpeg"), ("webp", ".webp", "image/webp")],
)
def test_urls_name_files_that_need_nothing_but_their_name(
    client: TestClient, output_format: str, suffix: str, kind: str
) -> None:
    body = {"prompt": "x", "n": 2, "response_format": "url", "output_format": output_format}
    data = client.post(GENERATIONS, json=body).json()["data"]
    assert [set(image) for image in data] == [{"url"}] * 2
    assert data[0] != data[1]
    url = data[0]["url"]
    assert url.startswith("http://testserver" + PUBLIC_PREFIX) and url.endswith(suffix)
    file = client.get(url)
    assert file.headers["content-type"] == kind
    assert file.headers["cache-control"].startswith("private, max-age=3")
    assert Image.open(BytesIO(file.content)).size == (1, 1)
    head = client.head(url)
    assert head.headers["content-length"] == str(len(file.content))
    assert head.content == b""


def test_files_say_how_they_can_be_had(client: TestClient) -> None:
    path = PUBLIC_PREFIX + "no.png"
    allowed = client.options(path).headers["allow"].split(", ")
    assert sorted(allowed) == ["GET", "HEAD", "OPTIONS"]
    response = client.post(path)
    assert_refused(response, 405, None)
    assert "GET" in response.headers["allow"]


@pytest.mark.parametrize("name", ["no.png", "", "a/b.png", "..%2F..%2Fetc%2Fpasswd", "%00"])
def test_names_of_no_files_are_404(client: TestClient, name: str) -> None:
    assert_refused(client.get(PUBLIC_PREFIX + name), 404, None)


def test_urls_begin_as_the_client_named_this_server(serve: Serve) -> None:
    client = serve(allowed_hosts="*")

    def url(**headers: str) -> str:
        body = {"prompt": "x", "model": "dall-e-3"}
        response = client.post(GENERATIONS, json=body, headers=headers)
        return str(response.json()["data"][0]["url"])

    assert url(Host="sd.example:8080").startswith("http://sd.example:8080/v1/")
    assert url(Host="[::1]:3000").startswith("http://[::1]:3000/v1/")
    assert url(**{"X-Forwarded-Host": "evil.example"}).startswith("http://testserver/v1/")
    assert url(Host="evil.example/path?").startswith("http://testserver:80/v1/")


def test_urls_begin_as_the_settings_say_and_end_when_they_say(serve: Serve) -> None:
    client = serve(public_url="https://sd.example/prefix/", url_bytes=600)  # one image and a half
    body = {"prompt": "x", "response_format": "url"}
    url = client.post(GENERATIONS, json=body).json()["data"][0]["url"]
    assert url.startswith("https://sd.example/prefix" + PUBLIC_PREFIX)
    path = url.removeprefix("https://sd.example/prefix")
    assert 300 < len(client.get(path).content) < 600
    client.post(GENERATIONS, json=body)
    assert_refused(client.get(path), 404, None)
    assert_refused(client.post(GENERATIONS, json=body | {"n": 2}), 413, "response_format")


def test_a_stream_ends_with_each_image(client: TestClient) -> None:
    body = {"prompt": "x", "n": 2, "stream": True, "partial_images": 2, "size": "64x128"}
    response = client.post(GENERATIONS, json=body | {"model": "gpt-image-1"})
    assert response.headers["x-sdbento-model"] == "shapes"
    assert "gpt-image-1" in response.headers["x-sdbento-warnings"]
    sent = events(response)
    assert [name for name, _ in sent] == ["image_generation.completed"] * 2
    for name, data in sent:
        assert data["type"] == name
        assert Image.open(BytesIO(b64decode(data["b64_json"]))).size == (1, 1)
        assert data["usage"]["total_tokens"] == 1


def test_a_stream_tells_what_is_not_as_asked_before_it_begins(serve: Serve) -> None:
    client = serve(max_pixels=64 * 64)
    files, data = {"image": png(size=(128, 128))}, {"prompt": "x", "stream": "true"}
    streamed = client.post(EDITS, files=files, data=data)
    plain = client.post(EDITS, files=files, data={"prompt": "x"})
    warnings = json.loads(streamed.headers["x-sdbento-warnings"])
    assert warnings == json.loads(plain.headers["x-sdbento-warnings"])
    assert "reduced to 64 x 64" in warnings[0]
    assert events(streamed)[-1][1]["size"] == "64x64"


def test_a_stream_that_is_refused_is_no_stream(client: TestClient) -> None:
    for wrong in ({"scheduler": "nope"}, {"size": "4096x4096"}, {"strength": 0.5}):
        response = client.post(GENERATIONS, json={"prompt": "x", "stream": True} | wrong)
        assert_refused(response, 400, next(iter(wrong)))


def test_a_stream_that_fails_ends_with_an_error(serve: Serve) -> None:
    def fails(trajectory: Trajectory) -> Exception | None:
        return OutOfMemory("too large") if trajectory.step == 3 else None

    client = serve(FakeRunner(fails))
    response = client.post(GENERATIONS, json={"prompt": "x", "stream": True})
    assert response.status_code == 200
    [(name, data)] = events(response)
    assert name == data["type"] == "error"
    assert data["error"]["message"] == "too large"
    assert data["error"]["type"] == "server_error"
    assert_refused(client.post(GENERATIONS, json={"prompt": "x"}), 503, None, "too large")
    with pytest.raises(openai.APIError, match="too large") as raised:
        list(sdk(client).images.generate(prompt="x", stream=True))
    assert raised.value.type == "server_error"


def test_a_full_queue_is_a_rate_limit(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Overloaded("the queue is full", retry_after=2.5)

    client = serve()
    monkeypatch.setattr(App, "run", refuse)
    monkeypatch.setattr(App, "stream", refuse)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as raised:
            sdk(client).images.generate(prompt="x", stream=stream)
        assert raised.value.response.headers["retry-after"] == "3"


def test_keys_are_asked_for_and_urls_need_none(serve: Serve, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"right").hexdigest()
    keys = [{"name": "a", "hash": f"sha256:{digest}", "models": ["shapes"], "images_at_once": 2}]
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    client = serve(api_keys=tmp_path / "keys.json")
    with pytest.raises(openai.AuthenticationError) as wrong:
        sdk(client).images.generate(prompt="x")
    assert (wrong.value.code, wrong.value.type) == ("invalid_api_key", "authentication_error")
    allowed = sdk(client).with_options(api_key="right")
    with pytest.raises(openai.PermissionDeniedError) as forbidden:
        allowed.images.generate(prompt="x", model="sdxl")
    assert forbidden.value.type == "permission_error"
    with pytest.raises(openai.PermissionDeniedError) as too_many:
        allowed.images.generate(prompt="x", n=3)
    assert too_many.value.param == "n"
    assert [model.id for model in allowed.models.list()] == ["shapes"]
    with pytest.raises(openai.NotFoundError):
        allowed.models.retrieve("sdxl")
    data = allowed.images.generate(prompt="x", model="dall-e-3").data
    assert data is not None and data[0].url is not None
    assert client.get(data[0].url).status_code == 200
    assert client.get("/v1/models").status_code == 401
    assert client.options(GENERATIONS).status_code == 204


@pytest.mark.parametrize("path", [EDITS, VARIATIONS])
def test_several_images_are_one_and_a_warning(client: TestClient, path: str) -> None:
    files = [("image[]", ("a.png", png())), ("image[]", ("b.png", b"not read"))]
    response = client.post(path, files=files, data={"prompt": "x"})
    assert response.status_code == 200
    assert "first of 2" in response.headers["x-sdbento-warnings"]


def test_masks_must_have_holes(client: TestClient) -> None:
    for mask in (png(), png("L", 0), png("RGBA", (0, 0, 0, 1))):
        files = {"image": png(), "mask": mask}
        assert_refused(client.post(EDITS, files=files, data={"prompt": "x"}), 400, "mask")
    files = {"image": png(), "mask": png("RGBA", (0, 0, 0, 0), (16, 8))}
    assert client.post(EDITS, files=files, data={"prompt": "x"}).status_code == 200


def test_masks_are_made_in_threads_of_which_each_client_has_a_share(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def holes(image: Image.Image) -> str:
        names.append(threading.current_thread().name)
        return b64encode(png("L", 255)).decode()

    monkeypatch.setattr(edits, "_holes", holes)
    for files in ({"image": png()}, {"image": png(), "mask": png()}):
        assert client.post(EDITS, files=files, data={"prompt": "x"}).status_code == 200
    assert len(names) == 2 and all(name.startswith("sdbento-images") for name in names)


@pytest.mark.parametrize(("path", "unused"), [(EDITS, "mask_image"), (VARIATIONS, "mask")])
def test_a_mask_that_is_not_used_is_a_warning(client: TestClient, path: str, unused: str) -> None:
    files = {"image": png(), "mask": png("RGBA", (0, 0, 0, 0)), "mask_image": png("L", 255)}
    response = client.post(path, files=files, data={"prompt": "x"})
    assert response.status_code == 200, response.text
    (warning,) = json.loads(response.headers["x-sdbento-warnings"])
    assert warning.startswith(f"{unused} was not used")


@pytest.mark.parametrize("path", [EDITS, VARIATIONS])
def test_an_image_may_be_upscaled(client: TestClient, path: str) -> None:
    body = {"prompt": "x", "image": b64encode(png()).decode(), "upscale": {"scale": 2}}
    assert client.post(path, json=body).status_code == 200
    refused = client.post(path, json=body | {"strength": 0.5})
    assert_refused(refused, 400, "strength", "upscale")


@pytest.mark.parametrize("param", ["image", "mask"])
def test_images_that_are_none_are_named(client: TestClient, param: str) -> None:
    files = {"image": png()} | {param: b"no image"}
    assert_refused(client.post(EDITS, files=files, data={"prompt": "x"}), 400, param)


def test_what_is_wrong_without_an_image_is_said_before_one_is_read(client: TestClient) -> None:
    for wrong in ({"size": "big"}, {"background": "transparent"}):
        body = {"prompt": "x", "image": "https://127.0.0.1/a.png"} | wrong
        assert_refused(client.post(EDITS, json=body), 400, next(iter(wrong)))


def test_private_addresses_are_not_fetched(client: TestClient) -> None:
    url = "https://127.0.0.1/a.png"
    for body in ({"image": url}, {"image": png().hex(), "mask": url}):
        response = client.post(EDITS, json={"prompt": "x"} | body)
        assert_refused(response, 400, "mask" if "mask" in body else "image")


def test_variations_need_no_prompt(client: TestClient) -> None:
    response = client.post(VARIATIONS, files={"image": png()}, data={"n": "2", "user": "me"})
    assert len(response.json()["data"]) == 2
    assert response.json()["usage"]["total_tokens"] == 0


@pytest.mark.parametrize("path", PATHS)
def test_routes_answer_pings_slashes_and_wrong_methods(client: TestClient, path: str) -> None:
    assert client.options(path).status_code == 204
    for wrong in (client.get, client.delete, client.put):
        assert_refused(wrong(path), 405, None)
    assert_refused(client.post(path + "/", content=b"[]"), 400, None, "object")
    assert_refused(client.post(path + "/more"), 404, None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 60, b'{"prompt": NaN}']
)
def test_bodies_that_are_none_are_refused(client: TestClient, path: str, body: bytes) -> None:
    response = client.post(path, content=body)
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"prompt": 7}, "prompt"),
        ({"prompt": "x" * 10_001}, "prompt"),
        ({"prompt": "word " * 1000}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 10**30}, "n"),
        ({"seed": 10**30}, "seed"),
        ({"size": {}}, "size"),
        ({"size": "9" * 1000 + "x9"}, "size"),
        ({"model": "x" * 501}, "model"),
        ({"model": 3}, "model"),
        ({"stream": {}}, "stream"),
        ({"timeout": -1}, "timeout"),
        ({"controlnet": "canny"}, "controlnet.0"),
        ({"image": "https://127.0.0.1/a.png"}, "image"),
        ({"scheduler": "\0"}, "scheduler"),
    ],
)
def test_wrong_values_are_400_with_their_name(
    client: TestClient, wrong: dict[str, Any], param: str
) -> None:
    assert_refused(client.post(GENERATIONS, json={"prompt": "x"} | wrong), 400, param)


def test_models_are_ours_with_the_default_first(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert listed == client.get("/v1/models/").json()
    first = listed["data"][0]
    assert set(first) == {"id", "object", "created", "owned_by"}
    assert (first["id"], first["object"], first["owned_by"]) == ("shapes", "model", "sdbento")
    assert isinstance(first["created"], int)
    for model in listed["data"]:
        assert client.get(f"/v1/models/{model['id']}").json() == model
    for name in ("SDXL-Turbo", "openai/sdxl-turbo"):  # as in the field `model`
        assert client.get(f"/v1/models/{name}").json()["id"] == "stabilityai/sdxl-turbo"
    assert client.options("/v1/models").status_code == 204


@pytest.mark.parametrize("name", ["gpt-image-1", "a/b", "%00", "..%2Fx", "x" * 5000, "ä"])
def test_a_model_that_is_not_ours_is_404(client: TestClient, name: str) -> None:
    assert_refused(client.get(f"/v1/models/{name}"), 404, "model", "/v1/models")
