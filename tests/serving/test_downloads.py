"""Models and LoRAs of the Hub on a real server: what is fetched, and who waits for whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch

from tests.support.fake_hub import FakeHub, Repository, Sent, fake_hub
from tests.support.server import Server, assert_error, post, serving
from tests.support.tiny import save_tiny

UNET = "unet/diffusion_pytorch_model.safetensors"
LIMIT = 60.0
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
    hub.faults.status = 0
    return hub.add(f"org/{request.node.name}", folder / "models" / "mine")


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def leave(server: Server, seconds: float = 3.0, **fields: Any) -> None:
    """Ask, and hang up."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/generate", json={**QUICK, **fields}, timeout=seconds)


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
    slow = threading.Thread(target=leave, args=(server, 30.0), kwargs={"model": "org/test_gone"})
    slow.start()
    until(lambda: path in hub.under_way)
    for name in ("org/other", "mine"):
        assert post(server, **QUICK, model=name).status_code == 200
    assert slow.is_alive()
    assert path in hub.under_way
    slow.join()
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


def test_hub_fault(server: Server, repository: Repository, hub: FakeHub) -> None:
    for status, words in ((500, "the Hub has a fault"), (429, "asks for a pause")):
        hub.faults.status, hub.faults.where = status, "/tree/"
        assert_error(post(server, **QUICK, model="org/test_hub_fault"), 503, words)
    hub.faults.status = 0
    assert post(server, **QUICK, model="org/test_hub_fault").status_code == 200


def test_damaged(server: Server, repository: Repository, hub: FakeHub) -> None:
    whole = repository.files[UNET]
    repository.files[UNET] = Sent(whole.content[:-100])
    response = post(server, **QUICK, model="org/test_damaged")
    assert_error(response, 422, "a damaged one", param="model")
    repository.files[UNET], repository.revision = whole, "2" * 40
    assert post(server, **QUICK, model="org/test_damaged").status_code == 200


def test_lora(server: Server, hub: FakeHub, folder: Path) -> None:
    """Of the Hub: too large, held up, and good."""
    hub.faults.status = 0
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
    leave(server, **asked, lora={"model_id": "org/loras/held"})
    until(lambda: "org/loras/held.safetensors" not in hub.under_way)
    until(lambda: not partial_files(folder))
    unfit = post(server, **asked, lora={"model_id": "org/loras/good"})
    assert_error(unfit, 422, "org/loras/good")  # it was read, and has no layers of this model
    assert hub.sent["org/loras/good.safetensors"] == len(good)
