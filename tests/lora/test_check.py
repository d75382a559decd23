"""LoRAs that are refused while no model is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdbento.catalog.families import Family
from sdbento.catalog.specs import LoraSpec, ModelSpec, catalogued
from sdbento.environment import load_settings
from sdbento.errors import InvalidParameter, ModelLoadFailed, SDBentoError, UnsupportedModel
from sdbento.lora import lookup
from sdbento.lora.check import locate_loras

SD15 = next(spec for spec in catalogued() if spec.family is Family.SD15)
SDXL = next(spec for spec in catalogued() if spec.family is Family.SDXL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    loras = (
        LoraSpec("for-sd15", Family.SD15, "org/for-sd15"),
        LoraSpec("lost", Family.SD15, str(tmp_path / "lost.safetensors")),
    )
    monkeypatch.setattr(lookup, "catalogued_loras", lambda: loras)
    for name in ("outline", "a/twin", "b/twin"):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"its content is not looked at")
    return tmp_path


def check(folder: Path, *names: str, spec: ModelSpec = SD15, **settings: Any) -> None:
    locate_loras(names, spec, load_settings(lora_dir=folder, **settings))


def test_available_loras_are_accepted(folder: Path) -> None:
    check(folder)
    check(folder, "outline", "a/twin", "for-sd15", "org/any", allow_lora_hub=True)
    check(folder, "https://93.184.215.14/a.safetensors", allow_lora_urls=True)


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("outlime", InvalidParameter, "no LoRA 'outlime'; the nearest: outline"),
        ("twin", InvalidParameter, "ambiguous: a/twin, b/twin"),
        ("org/any", InvalidParameter, "SDBENTO_ALLOW_LORA_HUB=false"),
        ("https://93.184.215.14/a", InvalidParameter, "SDBENTO_ALLOW_LORA_URLS=false"),
        ("a.ckpt", UnsupportedModel, "pickled"),
        ("lost", ModelLoadFailed, "cannot be read"),
    ],
)
def test_every_name_is_checked(
    name: str, error: type[SDBentoError], reason: str, folder: Path
) -> None:
    with pytest.raises(error, match=reason) as caught:
        check(folder, "outline", name, allow_lora_hub=False, allow_lora_urls=False)
    assert caught.value.param == "lora"


def test_a_url_that_may_not_be_fetched_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidParameter, match="private") as caught:
        check(folder, "https://127.0.0.1/a.safetensors", allow_lora_urls=True)
    assert caught.value.message.startswith("lora could not be fetched from 127.0.0.1: ")
    assert caught.value.param == "lora"


def test_a_catalogued_lora_of_another_family_is_refused(folder: Path) -> None:
    message = rf"LoRA for-sd15 does not fit model {SDXL.name} .* made for Stable Diffusion 1\.x"
    with pytest.raises(UnsupportedModel, match=message):
        check(folder, "for-sd15", spec=SDXL)
