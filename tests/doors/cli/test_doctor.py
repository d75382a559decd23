"""What `sdbento doctor` reports, on simulated machines."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import constants

from sdbento.access import entries
from sdbento.doors.cli import doctor
from sdbento.doors.cli.doctor import Finding
from sdbento.models import device
from sdbento.models.acceleration import attention
from sdbento.settings import Settings


def found(*findings: Finding) -> list[tuple[str, str]]:
    return [(finding.verdict, finding.text) for finding in findings]


def gpu(monkeypatch: pytest.MonkeyPatch, *, major: int, minor: int = 0) -> None:
    """A machine with one GPU of 24 GB."""
    properties = SimpleNamespace(name="Card", total_memory=24e9, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.parametrize(
    ("major", "minor", "precisions"),
    [
        (9, 0, "fp16, bf16 and fp8"),
        (8, 9, "fp16, bf16 and fp8"),
        (8, 6, "fp16 and bf16"),
        (7, 5, "fp16, no bf16"),
    ],
)
def test_a_gpu_is_reported_with_its_precision(
    monkeypatch: pytest.MonkeyPatch, major: int, minor: int, precisions: str
) -> None:
    gpu(monkeypatch, major=major, minor=minor)
    assert found(*doctor.examine_gpu()) == [("good", f"Card, 24.0 GB, {precisions}")]


@pytest.mark.parametrize(
    ("gpus", "verdict", "text"),
    [
        ("cpu:2", "good", "one each for CPU 1 of 2, CPU 2 of 2"),
        ("all", "good", "one, in the server's own process"),
        ("2", "bad", "SDBENTO_GPUS='2': torch sees no GPU"),
    ],
)
def test_engines_are_told_where_several_are_asked_for(gpus: str, verdict: str, text: str) -> None:
    assert found(*doctor.examine_engines(Settings(gpus=gpus, device="cpu"))) == [(verdict, text)]
    assert found(*doctor.examine_engines(Settings())) == []


def test_missing_xformers_is_reported_on_a_gpu_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu(monkeypatch, major=8)
    monkeypatch.setattr(doctor, "installed", lambda _: "not installed")
    [(verdict, text)] = found(*doctor.examine_settings(Settings()))
    assert (verdict, "it is not installed" in text) == ("note", True)


def test_a_cpu_has_torchs_own_attention() -> None:
    [(verdict, text)] = found(*doctor.examine_attention(Settings(device="cpu")))
    assert (verdict, "SDPA" in text) == ("good", True)


def test_the_attention_that_was_measured_on_the_gpu_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "choose_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(device, "choose_dtype", lambda *_: torch.float16)
    monkeypatch.setattr(attention, "typical_layers", lambda *_: {})
    monkeypatch.setattr(attention, "fastest", lambda *_: attention.XFORMERS)
    [(verdict, text)] = found(*doctor.examine_attention(Settings()))
    assert (verdict, text.startswith("xformers is the fastest")) == ("good", True)

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(attention, "typical_layers", fail)
    assert found(*doctor.examine_attention(Settings())) == [
        ("bad", "cannot be measured: CUDA out of memory")
    ]


def test_a_required_gpu_that_is_missing_is_a_problem() -> None:
    settings = Settings(device="cuda")
    assert ("bad", "SDBENTO_DEVICE=cuda cannot be honoured: there is no GPU") in found(
        *doctor.examine_settings(settings)
    )
    [(verdict, text)] = found(*doctor.examine_models(settings))
    assert (verdict, text.startswith("none can be loaded")) == ("bad", True)


def test_another_python_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.version_info", (3, 10, 0))
    python, _ = doctor.examine_python()
    assert (python.verdict, "sdbento wants 3.11 or 3.12" in python.text) == ("bad", True)


def test_a_disk_that_is_nearly_full_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1e9))
    finding = doctor.examine_disk()
    assert (finding.verdict, finding.text.startswith("1 GB free")) == ("note", True)


def test_the_hub_is_asked_unless_downloads_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(httpx, "head", lambda *_, **__: None)
    assert doctor.examine_hub(Settings()).text == "reachable"

    def unreachable(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("no route to host")

    monkeypatch.setattr(httpx, "head", unreachable)
    assert doctor.examine_hub(Settings()).text.startswith("not reachable")
    assert doctor.examine_hub(Settings(offline=True)).text.startswith("not asked")


def test_a_port_that_is_taken_is_noted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        finding = doctor.examine_port("127.0.0.1", taken.getsockname()[1])
    assert finding.verdict == "note"
    assert "`sdbento serve --port` takes another" in finding.text


def test_a_server_for_others_without_a_key_is_a_problem(tmp_path: Path) -> None:
    [(verdict, text)] = found(*doctor.examine_keys(Settings(), "0.0.0.0"))
    assert verdict == "bad" and "listens on 0.0.0.0" in text and "SDBENTO_API_KEY" in text
    [(verdict, text)] = found(*doctor.examine_keys(Settings(), "127.0.0.1"))
    assert verdict == "note" and text.startswith("none")
    entries.add(tmp_path / "keys.yaml", "alice")
    guarded = {"api_key": "sesame", "api_keys": tmp_path / "keys.yaml"}
    settings = Settings.model_validate(guarded)
    assert found(*doctor.examine_keys(settings, "0.0.0.0")) == [("good", "of alice, default")]
    (tmp_path / "keys.yaml").write_text("- [")
    [(verdict, text)] = found(*doctor.examine_keys(settings, "127.0.0.1"))
    assert verdict == "bad" and "neither YAML nor JSON" in text


def test_models_that_do_not_fit_are_noted() -> None:
    findings = found(*doctor.examine_models(Settings(device="cpu", memory_gb=1)))
    assert any(
        verdict == "note" and text.endswith("more than it may take") for verdict, text in findings
    )
    assert any(verdict == "good" and text.startswith("shapes: ") for verdict, text in findings)


def test_a_finding_is_one_line() -> None:
    assert str(Finding("port", "it is taken", "note")) == "--  port       it is taken"


def test_the_default_model_is_named_with_the_rule_that_chose_it() -> None:
    [(_, text)] = found(doctor.examine_default_model(Settings(device="cpu")))
    assert text.startswith("emoji: SD_MODEL is unset, and no GPU")
    [(_, text)] = found(doctor.examine_default_model(Settings(device="cpu", sd_model="mine")))
    assert text == "mine: SD_MODEL names it"
