"""BentoML's own clients, unchanged, against a real server."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import pytest
from bentoml.exceptions import BentoMLException
from PIL import Image

from tests.support.serve_in_thread import serve_in_thread
from tests.support.server import QUICK, Server, alike, generated, pixels, post

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of importing BentoML


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with bentoml.SyncHTTPClient(server.url) as client:
        yield client
        client._temp_dir.cleanup()  # left to the collector by the client


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[Any]:
    async with bentoml.AsyncHTTPClient(server.url) as client:
        yield client
        client._temp_dir.cleanup()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "in.png"
    Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(path)
    return path


def same(image: Image.Image, expected: Any) -> bool:
    return alike(np.asarray(image.convert("RGB"), dtype=np.int16), expected)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving_files(folder: Path) -> Iterator[str]:
    handler = partial(_Quiet, directory=str(folder))
    with serve_in_thread(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as files:
        yield f"http://127.0.0.1:{files.server_port}"


def as_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_a_request_is_given_by_its_fields_or_whole(client: Any, server: Server) -> None:
    [expected] = generated(server, **QUICK)
    assert same(client.txt2img(**QUICK), expected)
    assert same(client.txt2img(QUICK), expected)
    rest = {name: value for name, value in QUICK.items() if name != "prompt"}
    assert same(client.txt2img(QUICK["prompt"], **rest), expected)
    for answer in (client.generate(**QUICK, num_images=2), client.generate(QUICK)):
        assert alike(pixels(base64.b64decode(answer["images"][0])), expected)


def test_objects_lists_and_nulls_arrive_as_they_are(client: Any, server: Server) -> None:
    fields = {
        **QUICK,
        "lora": [{"model_id": "shapes-checker", "weight": 0.5}, {"model_id": "shapes-outline"}],
        "original_size": [128, 128],
        "negative_prompt": None,
    }
    [expected] = generated(server, **fields)
    assert same(client.txt2img(**fields), expected)
    assert same(client.txt2img(fields), expected)
    assert not same(client.txt2img(**QUICK), expected)


def test_a_prompt_that_looks_like_json_is_that_text(client: Any) -> None:
    answer = client.generate(prompt='{"prompt": "a cat"}', num_inference_steps=1)
    assert answer["parameters"]["prompt"] == '{"prompt": "a cat"}'
    assert client.generate("123", num_inference_steps=1)["parameters"]["prompt"] == "123"


def test_images_are_paths_and_pil_images(client: Any, server: Server, picture: Path) -> None:
    fields = {**QUICK, "strength": 0.9}
    expected = pixels(post(server, "/img2img", image=as_base64(picture), **fields).content)
    with Image.open(picture) as opened:
        in_memory = Image.open(BytesIO(picture.read_bytes()))
        for image in (picture, str(picture), opened, in_memory):
            assert same(client.img2img(image=image, **fields), expected)
    mask = {"mask_image": picture}
    repainted = client.inpaint(image=picture, **mask, **QUICK)
    assert repainted.size == (128, 128) and not same(repainted, expected)


def test_images_are_base64_data_uris_and_urls(client: Any, server: Server, picture: Path) -> None:
    fields = {**QUICK, "strength": 0.9}
    text = as_base64(picture)
    expected = pixels(post(server, "/img2img", image=text, **fields).content)
    for source in (text, f"data:image/png;base64,{text}"):
        whole = {**fields, "image": source}
        assert same(client.img2img(whole), expected)
        [image] = client.generate(**whole)["images"]
        assert alike(pixels(base64.b64decode(image)), expected)
    with serving_files(picture.parent) as url:
        assert same(client.img2img(image=f"{url}/in.png", **fields), expected)


def test_a_stream_is_an_iterator_of_text(client: Any) -> None:
    text = "".join(client.generate_stream(**QUICK))
    assert [line for line in text.splitlines() if line.startswith("event")][-1] == "event: done"
    assert "".join(client.generate_stream(QUICK)).count("event: step") == 4


async def test_the_asynchronous_client_works(
    async_client: Any, server: Server, picture: Path
) -> None:
    [expected] = generated(server, **QUICK)
    assert same(await async_client.txt2img(**QUICK), expected)
    assert same(await async_client.txt2img(QUICK), expected)
    assert (await async_client.generate(**QUICK))["seeds"] == [7]
    again = await async_client.img2img(image=picture, **QUICK)
    assert again.size == (128, 128)
    text = "".join([part async for part in async_client.generate_stream(**QUICK)])
    assert text.count("event: step") == 4


def test_what_is_wrong_is_said_by_the_client_or_by_the_server(client: Any, picture: Path) -> None:
    with pytest.raises(TypeError, match="stepz"):
        client.txt2img(prompt="x", stepz=3)
    with pytest.raises(TypeError, match="prompt"):
        client.txt2img(seed=3)
    for prompt in ("x", {"prompt": "x"}):
        with pytest.raises(BentoMLException) as missing:
            client.img2img(prompt)
        assert json.loads(str(missing.value))["error"]["message"] == "image is required"
    with pytest.raises(BentoMLException, match="num_inference_steps"):
        client.inpaint("x", image=picture, mask_image=picture, num_inference_steps=0)
