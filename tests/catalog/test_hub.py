"""Whether the files of a model come from the Hub, from which mirror, or from the cache."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from sdbento.catalog import hub
from sdbento.catalog.downloads.process import HubError, HubProcess, Listing, RemoteFile
from sdbento.catalog.families import Family
from sdbento.catalog.folder import list_files
from sdbento.catalog.specs import ControlNetSpec, ModelSpec
from sdbento.errors import ModelLoadFailed, OutOfMemory, UnknownModel, UnsupportedModel
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


class FakeHub(HubProcess):
    """Repositories by name; an error stands for one that cannot be had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **repositories: Path | HubError) -> None:
        super().__init__()
        self.repositories = repositories
        self.cached: set[str] = set()
        self.wanted: list[str] = []
        self.asked: list[tuple[str, bool]] = []  # and whether it was the cache that was asked
        self.whole: list[bool] = []
        self.sizes: dict[str, int] = {}
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "HubProcess", lambda: self)
        monkeypatch.setattr(hub, "cached_folder", self.cached_folder)
        monkeypatch.setattr(hub, "try_to_load_from_cache", self.cached_file)

    def cached_folder(self, source: str) -> Path:
        self.asked.append((source, True))
        found = self.repositories.get(source)
        if source not in self.cached or not isinstance(found, Path):
            raise LocalEntryNotFoundError("not cached")
        return found

    def cached_file(self, source: str, path: str) -> str | None:
        try:
            file = self.cached_folder(source) / path
        except LocalEntryNotFoundError:
            return None
        return str(file) if file.is_file() else None

    def list(self, repo: str) -> Listing:
        self.asked.append((repo, False))
        found = self.repositories[repo]
        if isinstance(found, HubError):
            raise found
        files = {name: path.stat().st_size for name, path in list_files(found).items()}
        files |= dict.fromkeys([*CLUTTER, "README.md", "LICENSE"], 1)
        files |= {name: size for name, size in self.sizes.items() if name in files}
        listed = {name: RemoteFile(size, f"blob of {name}") for name, size in files.items()}
        return Listing(repo, "1" * 40, listed)

    def get(self, listing: Listing, paths: Collection[str], whole: bool) -> Path:
        self.wanted = [*paths]
        self.whole.append(whole)
        found = self.repositories[listing.repo]
        assert isinstance(found, Path)
        return found


def gone() -> HubError:
    return HubError(UnknownModel("no such model on the Hub, or it is private"), "absent")


def away() -> HubError:
    return HubError(ModelLoadFailed("the Hub cannot be reached"), "away")


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return save_tiny("sdxl", tmp_path / "remote")


def test_only_what_is_needed_is_downloaded(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch, main=remote)
    assert hub.fetch(model("main"), half=True, offline=False) == remote
    assert sorted(fake.wanted) == sorted(list_files(remote))


def test_configurations_come_without_weights(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch, main=remote)
    hub.fetch_configs(model("main"), offline=False)
    assert not any(path.endswith(".safetensors") for path in fake.wanted)
    assert "tokenizer_2/tokenizer.json" in fake.wanted
    assert "vae/config.json" in fake.wanted


def test_the_next_mirror_is_tried_when_one_is_gone(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch, first=gone(), second=remote)
    assert hub.fetch(model("first", "second"), half=False, offline=False) == remote
    assert fake.asked[0] == ("first", False)


def test_without_a_network_the_cache_is_used_and_no_mirror_is_tried(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch, first=away(), second=remote)
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
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= {*fake.wanted}


def test_a_cache_without_the_vocabulary_is_completed_from_the_hub(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = save_tiny("sdxl", tmp_path / "cache")
    (cache / "tokenizer_2/tokenizer.json").unlink()
    fake = FakeHub(monkeypatch, main=remote)
    monkeypatch.setattr(fake, "cached_folder", lambda _: cache)
    monkeypatch.setattr(hub, "cached_folder", fake.cached_folder)
    found = hub.fetch(model("main"), half=False, offline=False, prefer_cache=True)
    assert found == remote


def test_the_failure_of_the_mirror_is_reported_rather_than_the_missing_original(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeHub(monkeypatch, first=gone(), second=away())
    with pytest.raises(ModelLoadFailed, match="the Hub cannot be reached"):
        hub.fetch(model("first", "second"), half=False, offline=False)


# What is refused before it is downloaded


def test_weights_that_need_too_much_memory_are_not_downloaded(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch, main=remote)
    fake.sizes[FULL] = 30_000_000_000
    asked: list[int] = []

    def check(need: int) -> None:
        asked.append(need)
        raise OutOfMemory("too much")

    for half in (False, True):
        with pytest.raises(OutOfMemory):
            hub.fetch(model("main"), half=half, offline=False, check=check)
    assert asked[0] > 30_000_000_000 > asked[1] > 15_000_000_000
    assert FULL not in fake.wanted


def test_weights_that_the_disk_does_not_hold_are_not_downloaded(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch, main=remote)
    fake.sizes[FULL] = 10**15
    with pytest.raises(ModelLoadFailed, match=r"1000000\.0 GB to download.*HF_HUB_CACHE"):
        hub.fetch(model("main"), half=False, offline=False)
    assert FULL not in fake.wanted
    fake.cached.add("main")
    assert hub.fetch(model("main"), half=False, offline=False) == remote


@pytest.mark.parametrize("file", ["model_index.json", "tokenizer/tokenizer.json"])
def test_configurations_that_are_too_large_are_not_downloaded(
    file: str, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch, main=remote)
    fake.sizes[file] = 10**9
    with pytest.raises(UnsupportedModel, match="bytes"):
        hub.fetch(model("main"), half=False, offline=False)
    assert file not in fake.wanted


def test_the_cache_gets_a_version_only_once_it_is_whole(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeHub(monkeypatch, main=remote)
    hub.fetch(model("main"), half=False, offline=False)
    assert fake.whole == [False, True]


# ControlNets


def test_a_controlnet_comes_without_the_rest_of_its_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "remote")
    fake = FakeHub(monkeypatch, first=gone(), second=folder)
    assert hub.fetch(controlnet("first", "second"), half=True, offline=False) == folder
    assert sorted(fake.wanted) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_controlnet_without_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_controlnet("sd15", tmp_path / "remote")
    (folder / CONTROL_FULL).unlink()
    FakeHub(monkeypatch, main=folder).cached.add("main")
    with pytest.raises(ModelLoadFailed, match="ControlNet c: its weights are not there"):
        hub.fetch(controlnet("main"), half=False, offline=True)
