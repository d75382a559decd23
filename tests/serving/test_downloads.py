"""Models and LoRAs of the Hub on a real server: what is fetched, and who waits for whom."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.support.fake_hub import FakeHub, Repository, Sent, fake_hub
from tests.support.server import Server, assert_error, post, serving
from tests.support.tiny import save_tiny

UNET = "unet/diffusion_pytorch_model.safetensors"
LIMIT = 60.0
HEAD = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
QUICK: dict[str, Any] = {"prompt": "x", "num_inference_steps": 1, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("downloads")
    save_tiny("sd15", folder / "models" / "mine")
    return folder


@pytest.fixture(scope="module")
def server(hub: FakeHub, folder: Path) -> Iterator[Server]:
    variables: dict[str, Any] = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DOWNLOAD_TIMEOUT": "30",
        "SDBENTO_MODELS_DIR": str(folder / "models"),
        "SDBENTO_MEMORY_GB": "14",
    }
    with serving(folder, **variables) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture
def repository(hub: FakeHub, folder: Path, request: pytest.FixtureRequest) -> Repository:
    """`org/NAME` for each test, a tiny model of Stable Diffusion 1.5."""
    return hub.add(f"org/{request.node.name}", folder / "models" / "mine")


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


@contextmanager
def asking(server: Server, **fields: Any) -> Iterator[None]:
    """A client that has asked for an image, and hangs up at the end of the block."""
    body = json.dumps({**QUICK, **fields})
    port = server.client.base_url.port
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(HEAD.format(len(body)).encode() + body.encode())
        yield


def partial_files(folder: Path) -> list[Path]:
    return [*(folder / "cache").rglob("*.incomplete")]


def test_any_model(server: Server, repository: Repository, hub: FakeHub) -> None:
    """Nobody but this machine can reach the server."""
    assert post(server, **QUICK, model="org/test_any_model").status_code == 200
    assert "SDBENTO_ALLOW_ANY_MODEL" in server.log.read_text()


def test_too_large(server: Server, repository: Repository, hub: FakeHub) -> None:
    repository.files[UNET] = Sent(size=30_000_000_000)
    response = post(server, **QUICK, model="org/test_too_large")
    assert_error(response, 503, "30.", "14.0 GB", "SDBENTO_MEMORY_GB")
    assert response.json()["error"]["type"] == "out_of_memory"
    assert f"org/test_too_large/{UNET}" not in hub.sent


def test_gone(server: Server, repository: Repository, hub: FakeHub, folder: Path) -> None:
    """A download whose client has left ends, and has kept nobody waiting meanwhile."""
    whole = repository.files[UNET]
    repository.files[UNET] = Sent(size=60_000_000, hold=threading.Event())
    hub.add("org/other", folder / "models" / "mine")
    path = f"org/test_gone/{UNET}"
    with asking(server, model="org/test_gone"):
        until(lambda: path in hub.under_way)
        for name in ("org/other", "mine"):
            assert post(server, **QUICK, model=name).status_code == 200
        assert path in hub.under_way
    until(lambda: path not in hub.under_way)
    until(lambda: not partial_files(folder))
    assert hub.sent[path] < 60_000_000
    repository.files[UNET] = whole
    assert post(server, **QUICK, model="org/test_gone").status_code == 200


def test_late(server: Server, repository: Repository, hub: FakeHub, folder: Path) -> None:
    repository.files[UNET] = Sent(size=60_000_000, hold=threading.Event())
    response = post(server, **QUICK, model="org/test_late", timeout=5)
    assert_error(response, 504, "within the request's timeout")
    until(lambda: f"org/test_late/{UNET}" not in hub.under_way)
    until(lambda: not partial_files(folder))


@pytest.mark.long
def test_hub_fault(server: Server, hub: FakeHub, folder: Path) -> None:
    """Each answer takes a while, in which huggingface_hub tries again."""
    faults = {500: "the Hub has a fault", 429: "asks for a pause"}
    with ThreadPoolExecutor() as pool:
        answers = {}
        for status in faults:
            hub.add(f"org/fault-{status}", folder / "models" / "mine").status = status
            answers[status] = pool.submit(post, server, **QUICK, model=f"org/fault-{status}")
        for status, words in faults.items():
            assert_error(answers[status].result(), 503, words)
    hub.repositories["org/fault-500"].status = 200
    assert post(server, **QUICK, model="org/fault-500").status_code == 200


def test_damaged(server: Server, repository: Repository, hub: FakeHub) -> None:
    whole = repository.files[UNET]
    repository.files[UNET] = Sent(whole.content[:-100])
    response = post(server, **QUICK, model="org/test_damaged")
    assert_error(response, 422, "a damaged one", param="model")
    repository.files[UNET], repository.revision = whole, "2" * 40
    assert post(server, **QUICK, model="org/test_damaged").status_code == 200


def test_lora(server: Server, hub: FakeHub, folder: Path) -> None:
    """Of the Hub: too large, held up, and good."""
    good = safetensors.torch.save({"x": torch.zeros(1)})
    hub.add("org/loras").files |= {
        "huge.safetensors": Sent(size=2_000_000_000),
        "held.safetensors": Sent(size=60_000_000, hold=threading.Event()),
        "good.safetensors": Sent(good),
    }
    asked = {**QUICK, "model": "mine"}
    huge = post(server, **asked, lora={"model_id": "org/loras/huge"})
    assert_error(huge, 413, "the limit is 1500000000")
    assert "org/loras/huge.safetensors" not in hub.sent
    with asking(server, **asked, lora={"model_id": "org/loras/held"}):
        until(lambda: "org/loras/held.safetensors" in hub.under_way)
    until(lambda: "org/loras/held.safetensors" not in hub.under_way)
    until(lambda: not partial_files(folder))
    unfit = post(server, **asked, lora={"model_id": "org/loras/good"})
    assert_error(unfit, 422, "org/loras/good")  # it was read, and has no layers of this model
    assert hub.sent["org/loras/good.safetensors"] == len(good)
