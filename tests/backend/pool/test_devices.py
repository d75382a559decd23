"""Which devices get an engine each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdbento.backend.pool.devices import engine_devices
from sdbento.environment import environment_on_gpu, load_settings
from sdbento.settings import Settings, SettingsError


def devices(gpus: str, **options: Any) -> list[tuple[str, int | None]]:
    settings = Settings(sd_model="shapes", gpus=gpus, **options)
    return [(device.name, device.gpu) for device in engine_devices(settings)]


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("gpus", "chosen"), [("all", [0, 1, 2, 3]), ("2", [0, 1]), ("3,1", [3, 1]), ("1", []), ("", [])]
)
def test_gpus_are_counted_or_named(gpus: str, chosen: list[int]) -> None:
    assert devices(gpus) == [(f"GPU {gpu}", gpu) for gpu in chosen]


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("gpus", ["5", "0,4"])
def test_more_gpus_than_there_are_is_an_error(gpus: str) -> None:
    with pytest.raises(SettingsError, match=f"SDBENTO_GPUS='{gpus}': torch sees 4 GPUs"):
        devices(gpus)


def test_without_gpus_all_is_one_engine_and_any_number_an_error() -> None:
    assert devices("all", device="cpu") == []
    with pytest.raises(SettingsError, match="torch sees no GPU"):
        devices("2", device="cpu")


@pytest.mark.parametrize("gpus", ["0", "-1", "some", "0,", "cpu", "cpu:0", "1000"])
def test_what_is_no_choice_is_refused(gpus: str) -> None:
    with pytest.raises(SettingsError, match="SDBENTO_GPUS"):
        load_settings(gpus=gpus)


def test_a_cpu_is_divided() -> None:
    settings = Settings(sd_model="shapes", gpus="cpu:2", num_threads=0, memory_gb=None)
    parts = engine_devices(settings)
    assert [part.name for part in parts] == ["CPU 1 of 2", "CPU 2 of 2"]
    for part in parts:
        assert part.settings.num_threads >= 1
        assert part.settings.memory_gb and part.settings.device == "cpu"
        assert engine_devices(part.settings) == []  # an engine process starts no others
    assert devices("cpu:1") == []


@pytest.mark.parametrize(
    ("visible", "gpu", "expected"),
    [(None, 1, "1"), ("", 1, "1"), ("4,6", 1, "6"), ("MIG-a, MIG-b", 1, "MIG-b"), ("4", None, "")],
)
def test_an_engine_process_sees_its_own_gpu(
    visible: str | None, gpu: int | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment_on_gpu(gpu)["CUDA_VISIBLE_DEVICES"] == expected
