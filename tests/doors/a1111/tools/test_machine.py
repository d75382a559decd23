"""What clients ask about the installation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from sdbento.request.schema import MAX_CONTROLNETS
from tests.support.a1111 import serving_a1111


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with serving_a1111(tmp_path) as client:
        yield client


def get(client: TestClient, route: str) -> Any:
    response = client.get(f"/sdapi/v1/{route}")
    assert response.status_code == 200, response.text
    return response.json()


def test_scripts_have_lower_case_names(client: TestClient) -> None:
    names = ["controlnet", "controlnet m2m"]
    assert get(client, "scripts") == {"txt2img": names, "img2img": names}
    for_text, for_images = get(client, "script-info")
    assert (for_text["is_img2img"], for_images["is_img2img"]) == (False, True)
    assert for_text["name"] == "controlnet"
    assert for_text["is_alwayson"] is True
    assert len(for_text["args"]) == MAX_CONTROLNETS
    assert for_text["args"][0].keys() == {"label", "value", "minimum", "maximum", "step", "choices"}


def test_flags(client: TestClient) -> None:
    assert get(client, "cmd-flags")["api"] is True


def test_memory(client: TestClient) -> None:
    memory = get(client, "memory")
    ram = memory["ram"]
    assert ram["free"] + ram["used"] == ram["total"] > 0
    if not torch.cuda.is_available():
        assert memory["cuda"] == {"error": "unavailable"}


def test_memory_of_a_gpu(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("active", "allocated", "reserved", "inactive_split")
    counts = {f"{kind}_bytes.all.{when}": 7 for kind in kinds for when in ("current", "peak")}
    counts |= {"num_alloc_retries": 1, "num_ooms": 2}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30, 100))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: counts)
    cuda = get(client, "memory")["cuda"]
    assert cuda["system"] == {"free": 30, "used": 70, "total": 100}
    for kind in ("active", "allocated", "reserved", "inactive"):
        assert cuda[kind] == {"current": 7, "peak": 7}
    assert cuda["events"] == {"retries": 1, "oom": 2}
