"""The requests from the page of the RunPod worker, unchanged but for the URLs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import pytest

from sdbento.app import App
from sdbento.environment import load_settings
from sdbento.images.preprocessors import preprocess
from sdbento.request.schema import GenerateRequest
from tests.support.images import gradient
from tests.support.server import ROOT, Server, generated, serving
from tests.support.tiny import save_tiny

TEXT_TO_IMAGE: dict[str, Any] = {
    "prompt": "A photorealistic cat astronaut floating in space, 4k, detailed",
    "negative_prompt": "deformed, ugly, bad anatomy",
    "width": 1024,
    "height": 1024,
    "num_inference_steps": 30,
    "guidance_scale": 7.5,
    "seed": 42,
}
IMAGE_TO_IMAGE: dict[str, Any] = {
    "prompt": "A castle in a magical forest",
    "negative_prompt": "deformed, ugly, bad anatomy",
    "image": "https://example.com/input-image.jpg",
    "strength": 0.75,
    "num_inference_steps": 30,
    "guidance_scale": 7.5,
}
CONTROLNET: dict[str, Any] = {
    "prompt": "A fantasy landscape with mountains",
    "controlnet": {
        "type": "canny",
        "image": "https://example.com/canny-image.jpg",
        "conditioning_scale": 0.8,
    },
}
LORA: dict[str, Any] = {
    "prompt": "A portrait in the style of <lora:name:1.0>",
    "lora": {"model_id": "path/to/lora", "weight": 0.8},
}


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A host with the page's two images."""
    folder = tmp_path_factory.mktemp("images")
    gradient(160, 120).save(folder / "input-image.jpg")
    preprocess("canny", gradient(128, 128)).save(folder / "canny-image.jpg")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose LoRA folder has what the page calls path/to/lora."""
    loras = tmp_path_factory.mktemp("loras")
    (loras / "path" / "to").mkdir(parents=True)
    own = ROOT / "sdbento" / "bundled" / "shapes-outline" / "pytorch_lora_weights.safetensors"
    copyfile(own, loras / "path" / "to" / "lora.safetensors")
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, SDBENTO_ALLOW_PRIVATE_URLS="true", SDBENTO_LORA_DIR=str(loras)) as server:
        server.wait_until_ready()
        yield server


def test_image_to_image(worker: Server, host: str) -> None:
    body = {**IMAGE_TO_IMAGE, "image": f"{host}/input-image.jpg"}
    assert generated(worker, **body)[0].shape == (120, 160, 3)


def test_controlnet(worker: Server, host: str) -> None:
    control = {**CONTROLNET["controlnet"], "image": f"{host}/canny-image.jpg"}
    body = {**CONTROLNET, "controlnet": control, "seed": 3}
    [steered] = generated(worker, **body)
    [free] = generated(worker, prompt=CONTROLNET["prompt"], seed=3)
    assert steered.shape == (128, 128, 3)
    assert np.abs(steered - free).max() > 30


def test_lora(worker: Server) -> None:
    """No LoRA has the tag's name, so it means the one LoRA that is listed: 1.0 times 0.8."""
    [styled] = generated(worker, **LORA, seed=3)
    [by_field] = generated(worker, prompt="A portrait in the style of", lora=LORA["lora"], seed=3)
    assert np.abs(styled - by_field).max() <= 1


@pytest.mark.long
async def test_text_to_image(tmp_path: Path) -> None:
    app = App(load_settings(sd_model=str(save_tiny("sdxl", tmp_path / "sdxl"))))
    app.start()
    try:
        result = await app.run(GenerateRequest(**TEXT_TO_IMAGE))
    finally:
        app.close()
    assert result.images[0].size == (1024, 1024)
    assert result.seeds == [42]
