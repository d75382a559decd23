"""Which files of a repository are needed, and from which mirror they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from sdbento.catalog import hub
from sdbento.errors import ModelLoadFailed, UnsupportedModel
from tests.support.tiny import save_tiny, save_tiny_controlnet

INDEX = {"unet": ["diffusers", "UNet2DConditionModel"], "tokenizer": ["transformers", "CLIP"]}
FULL, HALF = (
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
)
SHARDS = [
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
]
CLUTTER = [
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/model.onnx",
    "sd_xl_base_1.0.safetensors",
    "safety_checker/model.safetensors",
]


@pytest.mark.parametrize(
    ("files", "half", "chosen"),
    [
        ([FULL, HALF], True, [HALF]),
        ([FULL, HALF], False, [FULL]),
        ([FULL], True, [FULL]),
        ([HALF], False, [HALF]),
        ([FULL, *SHARDS], True, SHARDS),
        (["unet/model.safetensors"], True, ["unet/model.safetensors"]),
    ],
)
def test_one_variant_of_the_weights_is_needed(
    files: list[str], half: bool, chosen: list[str]
) -> None:
    assert hub.needed_weights("m", [*files, *CLUTTER], INDEX, half) == chosen


def test_pickled_weights_alone_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="pickled weights only"):
        hub.needed_weights("m", CLUTTER[:1], INDEX, half=False)


class FakeHub:
    """Repositories by name; an exception stands for one that cannot be had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **repositories: Path | Exception) -> None:
        self.repositories = repositories
        self.cached: set[str] = set()
        self.patterns: list[str] = []
        self.asked: list[tuple[str, bool]] = []
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "hf_hub_download", self.download)
        monkeypatch.setattr(hub, "snapshot_download", self.snapshot)
        monkeypatch.setattr(hub, "HfApi", lambda: self)

    def find(self, source: str, local: bool = False) -> Path:
        self.asked.append((source, local))
        if local and source not in self.cached:
            raise LocalEntryNotFoundError("not cached")
        found = self.repositories[source]
        if isinstance(found, Exception) and not local:
            raise found
        assert isinstance(found, Path)
        return found

    def download(self, source: str, path: str, *, local_files_only: bool) -> str:
        return str(self.find(source, local_files_only) / path)

    def snapshot(
        self, source: str, *, local_files_only: bool = False, allow_patterns: Any = None
    ) -> str:
        self.patterns = allow_patterns
        return str(self.find(source, local_files_only))

    def list_repo_files(self, source: str) -> list[str]:
        return [*hub.local_files(self.find(source)), *CLUTTER, "README.md", "LICENSE"]


def gone() -> Exception:
    return RepositoryNotFoundError.__new__(RepositoryNotFoundError)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return save_tiny("sdxl", tmp_path / "remote")


def test_only_what_is_needed_is_downloaded(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch, main=remote)
    assert hub.fetch("m", ["main"], half=True, offline=False) == remote
    assert sorted(fake.patterns) == sorted(hub.local_files(remote))


def test_configurations_come_without_weights(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch, main=remote)
    hub.fetch_configs("m", ["main"], offline=False)
    assert not any(pattern.endswith(".safetensors") for pattern in fake.patterns)
    assert "tokenizer_2/tokenizer.json" in fake.patterns
    assert "vae/config.json" in fake.patterns


def test_the_next_mirror_is_tried_when_one_is_gone(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch, first=gone(), second=remote)
    assert hub.fetch("m", ["first", "second"], half=False, offline=False) == remote
    assert fake.asked[0] == ("first", False)


def test_without_a_network_the_cache_serves_and_no_mirror_is_waited_for(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch, first=ConnectionError(), second=remote)
    fake.cached = {"second"}
    assert hub.fetch("m", ["first", "second"], half=False, offline=False) == remote
    assert ("second", False) not in fake.asked


def test_where_the_cache_is_preferred_the_hub_is_asked_for_what_is_not_in_it_only(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch, first=remote)
    fake.cached = {"first"}
    options: dict[str, Any] = {"half": False, "offline": False, "prefer_cache": True}
    assert hub.fetch("m", ["first"], **options) == remote
    assert all(local for _, local in fake.asked)
    fake.cached.clear()
    assert hub.fetch("m", ["first"], **options) == remote
    assert ("first", False) in fake.asked


def test_offline_nothing_is_asked_of_the_network(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch, first=remote)
    with pytest.raises(LocalEntryNotFoundError):
        hub.fetch("m", ["first"], half=False, offline=True)
    assert all(local for _, local in fake.asked)


@pytest.mark.parametrize("file", [FULL, "vae/diffusion_pytorch_model.safetensors"])
def test_an_incomplete_cache_is_told_so(
    file: str, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub(monkeypatch, main=remote).cached.add("main")
    (remote / file).unlink()
    with pytest.raises(ModelLoadFailed):
        hub.fetch("m", ["main"], half=False, offline=True)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("tokenizer/tokenizer.json", "m lacks tokenizer/vocab.json, tokenizer/merges.txt"),
        ("tokenizer_2/tokenizer.json", "m lacks tokenizer_2/vocab.json, tokenizer_2/merges.txt"),
        ("tokenizer_2/tokenizer_config.json", "m lacks tokenizer_2/tokenizer_config.json"),
        ("text_encoder/config.json", "m lacks text_encoder/config.json"),
        ("scheduler/scheduler_config.json", "m lacks scheduler/scheduler_config.json"),
    ],
)
def test_a_missing_configuration_or_vocabulary_is_named_wherever_the_model_lies(
    file: str, told: str, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (remote / file).unlink()
    FakeHub(monkeypatch, main=remote).cached.add("main")
    for source, offline in ((str(remote), True), ("main", False), ("main", True)):
        with pytest.raises(ModelLoadFailed, match=told):
            hub.fetch("m", [source], half=False, offline=offline)
    for offline in (False, True):
        with pytest.raises(ModelLoadFailed, match=told):
            hub.fetch_configs("m", ["main"], offline=offline)


def test_a_vocabulary_may_come_in_one_file_or_in_two(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the repositories of SD 1.5, 2.1 and XL have it: two."""
    fake = FakeHub(monkeypatch, main=remote)
    (remote / "tokenizer/tokenizer.json").rename(remote / "tokenizer/vocab.json")
    with pytest.raises(ModelLoadFailed, match=r"m lacks tokenizer/merges\.txt$"):
        hub.fetch("m", ["main"], half=False, offline=False)
    (remote / "tokenizer/merges.txt").touch()
    hub.fetch("m", ["main"], half=False, offline=False)
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= {*fake.patterns}


def test_a_cache_without_the_vocabulary_is_completed_from_the_hub(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = save_tiny("sdxl", tmp_path / "cache")
    (cache / "tokenizer_2/tokenizer.json").unlink()
    fake = FakeHub(monkeypatch, main=remote)
    monkeypatch.setattr(fake, "find", lambda _, local=False: cache if local else remote)
    found = hub.fetch("m", ["main"], half=False, offline=False, prefer_cache=True)
    assert found == remote


def test_the_mirrors_failure_is_told_rather_than_that_the_original_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeHub(monkeypatch, first=gone(), second=ConnectionError("the cable"))
    with pytest.raises(ConnectionError, match="the cable"):
        hub.fetch("m", ["first", "second"], half=False, offline=False)


# ControlNets, whose weights lie beside their configuration

CONTROL_FULL, CONTROL_HALF = (file.removeprefix("unet/") for file in (FULL, HALF))


@pytest.mark.parametrize(
    ("files", "half", "chosen"),
    [
        ([CONTROL_FULL, CONTROL_HALF], True, [CONTROL_HALF]),
        ([CONTROL_FULL, CONTROL_HALF], False, [CONTROL_FULL]),
        ([CONTROL_FULL, "diffusion_pytorch_model.bin", "model.safetensors"], True, [CONTROL_FULL]),
        ([CONTROL_FULL, "diffusion_pytorch_model_V2.safetensors", FULL], False, [CONTROL_FULL]),
    ],
)
def test_one_variant_of_a_controlnets_weights_is_needed(
    files: list[str], half: bool, chosen: list[str]
) -> None:
    assert hub.controlnet_weights("c", files, half) == chosen


def test_a_controlnet_comes_without_the_rest_of_its_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "remote")
    fake = FakeHub(monkeypatch, first=gone(), second=folder)
    assert hub.fetch_controlnet("c", ["first", "second"], half=True, offline=False) == folder
    assert sorted(fake.patterns) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_controlnet_without_weights_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "remote")
    (folder / CONTROL_FULL).unlink()
    FakeHub(monkeypatch, main=folder).cached.add("main")
    with pytest.raises(ModelLoadFailed, match="ControlNet c: its weights are not there"):
        hub.fetch_controlnet("c", ["main"], half=False, offline=True)
    with pytest.raises(UnsupportedModel, match="ControlNet c is not supported: it has pickled"):
        hub.controlnet_weights("c", ["diffusion_pytorch_model.bin"], half=False)
