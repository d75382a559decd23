"""Whether the files of a model come from the Hub, from which mirror, or from the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from sdbento.catalog import hub
from sdbento.catalog.families import Family
from sdbento.catalog.folder import list_files
from sdbento.catalog.specs import ControlNetSpec, ModelSpec
from sdbento.errors import ModelLoadFailed
from tests.support.tiny import save_tiny, save_tiny_controlnet

FULL = "unet/diffusion_pytorch_model.safetensors"
CONTROL_FULL = "diffusion_pytorch_model.safetensors"
CLUTTER = [
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/model.onnx",
    "sd_xl_base_1.0.safetensors",
    "safety_checker/model.safetensors",
]


def model(*sources: str) -> ModelSpec:
    return ModelSpec("m", Family.SDXL, sources, 64, 64, 4, 5.0, None, 0.1)


def controlnet(*sources: str) -> ControlNetSpec:
    return ControlNetSpec("c", Family.SD15, sources, 0.1)


class FakeHub:
    """Repositories by name; an exception stands for one that cannot be fetched."""

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
        return [*list_files(self.find(source)), *CLUTTER, "README.md", "LICENSE"]


def gone() -> Exception:
    return RepositoryNotFoundError.__new__(RepositoryNotFoundError)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return save_tiny("sdxl", tmp_path / "remote")


def test_only_what_is_needed_is_downloaded(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch, main=remote)
    assert hub.fetch(model("main"), half=True, offline=False) == remote
    assert sorted(fake.patterns) == sorted(list_files(remote))


def test_configurations_come_without_weights(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch, main=remote)
    hub.fetch_configs(model("main"), offline=False)
    assert not any(pattern.endswith(".safetensors") for pattern in fake.patterns)
    assert "tokenizer_2/tokenizer.json" in fake.patterns
    assert "vae/config.json" in fake.patterns


def test_the_next_mirror_is_tried_when_one_is_gone(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch, first=gone(), second=remote)
    assert hub.fetch(model("first", "second"), half=False, offline=False) == remote
    assert fake.asked[0] == ("first", False)


def test_without_a_network_the_cache_is_used_and_no_mirror_is_tried(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch, first=ConnectionError(), second=remote)
    fake.cached = {"second"}
    assert hub.fetch(model("first", "second"), half=False, offline=False) == remote
    assert ("second", False) not in fake.asked


def test_with_the_cache_preferred_only_missing_files_are_requested_from_the_hub(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch, first=remote)
    fake.cached = {"first"}
    options: dict[str, Any] = {"half": False, "offline": False, "prefer_cache": True}
    assert hub.fetch(model("first"), **options) == remote
    assert all(local for _, local in fake.asked)
    fake.cached.clear()
    assert hub.fetch(model("first"), **options) == remote
    assert ("first", False) in fake.asked


def test_offline_no_network_request_is_made(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch, first=remote)
    with pytest.raises(LocalEntryNotFoundError):
        hub.fetch(model("first"), half=False, offline=True)
    assert all(local for _, local in fake.asked)


@pytest.mark.parametrize("file", [FULL, "vae/diffusion_pytorch_model.safetensors"])
def test_an_incomplete_cache_is_refused(
    file: str, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub(monkeypatch, main=remote).cached.add("main")
    (remote / file).unlink()
    with pytest.raises(ModelLoadFailed):
        hub.fetch(model("main"), half=False, offline=True)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("tokenizer/tokenizer.json", "m lacks tokenizer/vocab.json, tokenizer/merges.txt"),
        ("tokenizer_2/tokenizer.json", "m lacks tokenizer_2/vocab.json, tokenizer_2/merges.txt"),
        ("tokenizer_2/tokenizer_config.json", "m lacks tokenizer_2/tokenizer_config.json"),
        ("text_encoder/config.json", "m lacks text_encoder/config.json"),
        ("scheduler/scheduler_config.json", "m lacks scheduler/scheduler_config.json"),
    ],
)
def test_a_missing_configuration_or_vocabulary_is_named_for_folder_and_hub_models(
    file: str, message: str, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (remote / file).unlink()
    FakeHub(monkeypatch, main=remote).cached.add("main")
    for source, offline in ((str(remote), True), ("main", False), ("main", True)):
        with pytest.raises(ModelLoadFailed, match=message):
            hub.fetch(model(source), half=False, offline=offline)
    for offline in (False, True):
        with pytest.raises(ModelLoadFailed, match=message):
            hub.fetch_configs(model("main"), offline=offline)


def test_a_vocabulary_may_come_in_one_file_or_in_two(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repositories of SD 1.5, 2.1 and XL have it in two."""
    fake = FakeHub(monkeypatch, main=remote)
    (remote / "tokenizer/tokenizer.json").rename(remote / "tokenizer/vocab.json")
    with pytest.raises(ModelLoadFailed, match=r"m lacks tokenizer/merges\.txt$"):
        hub.fetch(model("main"), half=False, offline=False)
    (remote / "tokenizer/merges.txt").touch()
    hub.fetch(model("main"), half=False, offline=False)
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= {*fake.patterns}


def test_a_cache_without_the_vocabulary_is_completed_from_the_hub(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = save_tiny("sdxl", tmp_path / "cache")
    (cache / "tokenizer_2/tokenizer.json").unlink()
    fake = FakeHub(monkeypatch, main=remote)
    monkeypatch.setattr(fake, "find", lambda _, local=False: cache if local else remote)
    found = hub.fetch(model("main"), half=False, offline=False, prefer_cache=True)
    assert found == remote


def test_the_failure_of_the_mirror_is_reported_rather_than_the_missing_original(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeHub(monkeypatch, first=gone(), second=ConnectionError("the cable"))
    with pytest.raises(ConnectionError, match="the cable"):
        hub.fetch(model("first", "second"), half=False, offline=False)


# ControlNets


def test_a_controlnet_comes_without_the_rest_of_its_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "remote")
    fake = FakeHub(monkeypatch, first=gone(), second=folder)
    assert hub.fetch(controlnet("first", "second"), half=True, offline=False) == folder
    assert sorted(fake.patterns) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_controlnet_without_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "remote")
    (folder / CONTROL_FULL).unlink()
    FakeHub(monkeypatch, main=folder).cached.add("main")
    with pytest.raises(ModelLoadFailed, match="ControlNet c: its weights are not there"):
        hub.fetch(controlnet("main"), half=False, offline=True)
