"""Device, precision and memory by hardware, and the errors where the hardware does not suffice."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from sdbento.app import App
from sdbento.catalog.families import Family
from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import ModelSpec
from sdbento.environment import load_settings
from sdbento.models import cache, device
from sdbento.models.device import (
    choose_device,
    choose_dtype,
    choose_vae_dtype,
    host_memory,
    memory_budget_gb,
    memory_need,
)
from sdbento.settings import Settings, SettingsError

GPU = torch.device("cuda")


def settings(**fields: Any) -> Settings:
    return load_settings(**{"sd_model": "shapes", "device": "cpu", "offline": True, **fields})


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_the_log_says_once_that_a_cpu_computes_in_fp32(precision: str, caplog: Any) -> None:
    device.say_once.cache_clear()
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert choose_dtype(settings(precision=precision), torch.device("cpu")) is torch.float32
    assert caplog.text.count(f"PRECISION={precision} needs a GPU") == 1


@pytest.mark.parametrize(
    ("precision", "has_bf16", "dtype"),
    [
        ("fp16", False, torch.float16),
        ("bf16", True, torch.bfloat16),
        ("bf16", False, torch.float16),
        ("fp32", True, torch.float32),
    ],
)
def test_a_gpu_computes_in_a_precision_that_it_supports(
    precision: str, has_bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_bf16", lambda: has_bf16)
    assert choose_dtype(settings(precision=precision), GPU) is dtype


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_beside_layers_in_fp8_all_else_is_in_bf16(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_dtype(settings(precision="fp8"), GPU) is torch.bfloat16


def test_fp8_is_refused_where_the_gpu_cannot_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(cache, "choose_device", lambda _: GPU)
    with pytest.raises(SettingsError) as caught:
        App(settings(precision="fp8"))
    assert str(caught.value) == (
        "PRECISION=fp8 needs an NVIDIA GPU of compute capability 8.9 or newer (Ada, Hopper); "
        "this one has 8.0: use bf16"
    )


@pytest.mark.parametrize(
    ("family", "force_upcast", "dtype", "has_bf16", "expected"),
    [
        ("sdxl", True, torch.float16, True, torch.bfloat16),
        ("sdxl", True, torch.float16, False, torch.float32),
        ("sdxl", False, torch.float16, True, torch.float16),
        ("sdxl", True, torch.float32, True, torch.float32),
        ("sd15", True, torch.float16, True, torch.float16),
    ],
)
def test_sdxls_vae_is_never_decoded_in_fp16(
    family: str,
    force_upcast: bool,
    dtype: torch.dtype,
    has_bf16: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "has_bf16", lambda: has_bf16)
    mine = ModelSpec("mine", Family(family), ("/nowhere",), 64, 64, 4, 5.0, None, 0.1)
    assert choose_vae_dtype(mine, force_upcast, dtype) is expected


def test_a_required_gpu_that_is_missing_is_a_bad_setting(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="SDBENTO_DEVICE='cuda'"):
        choose_device(settings(device="cuda"))
    assert choose_device(settings(device="auto")) == torch.device("cpu")


def test_the_budget_is_the_setting_or_a_share_of_the_memory(monkeypatch: Any) -> None:
    assert memory_budget_gb(settings(memory_gb=3.5)) == 3.5
    total, available = host_memory()
    assert 0 < available <= total
    assert memory_budget_gb(settings()) == pytest.approx(0.6 * total / 1e9)
    monkeypatch.setattr(device, "choose_device", lambda _: GPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (79 * 10**9, 80 * 10**9))
    assert memory_budget_gb(settings()) == pytest.approx(68)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 * 10**9, 80 * 10**9))
    assert memory_budget_gb(settings()) == pytest.approx(20)


def test_a_containers_limit_is_the_machines_memory(tmp_path: Path, monkeypatch: Any) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device, "CGROUP_LIMIT", limit)
    total, _ = host_memory()
    limit.write_text("max\n")
    assert host_memory()[0] == total
    limit.write_text(f"{10**9}\n")
    assert host_memory()[0] == 10**9
    limit.with_name("memory.current").write_text("700000000\n")
    stat = "anon 5\nactive_file 200000000\ninactive_file 100000000\n"
    limit.with_name("memory.stat").write_text(stat)
    assert host_memory() == (10**9, 10**9 - 400_000_000)


def test_fp32_needs_twice_the_memory() -> None:
    catalog = Catalog(settings())
    sdxl = catalog.resolve("sdxl")
    for wanted in (sdxl, catalog.controlnets(sdxl).resolve("canny")):
        assert memory_need(wanted, torch.float16) == wanted.memory_gb * 10**9
        assert memory_need(wanted, torch.float32) == 2 * wanted.memory_gb * 10**9
