"""Seven kinds of names, and what of them a request may use."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from sdbento.catalog.families import Family
from sdbento.catalog.specs import LoraSpec
from sdbento.environment import load_settings
from sdbento.errors import (
    InvalidParameter,
    ModelLoadFailed,
    SDBentoError,
    TooLarge,
    UnsupportedModel,
)
from sdbento.lora import files as lora_files
from sdbento.lora.files import (
    HubFile,
    LoraSource,
    Url,
    is_known,
    known_names,
    locate,
    nearest,
    read,
)
from sdbento.settings import Settings

TENSORS = {"unet.x.lora_A.weight": torch.arange(6.0).reshape(2, 3)}
STEM = "pytorch_lora_weights.safetensors"


def put(path: Path, marker: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(TENSORS, path, metadata={"marker": marker})
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "loras"
    for name in ("outline", "styles/ink", "styles/v1.5", "a/twin", "b/twin"):
        put(root / f"{name}.safetensors", name)
    put(root / "trained" / STEM, "trained")
    (root / "pickled.pt").write_bytes(b"")
    return root


@pytest.fixture(autouse=True)
def catalogued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LoraSpec]:
    specs = [
        LoraSpec("Bundled", Family.SD15, str(put(tmp_path / "bundled.safetensors")), ("bd",)),
        LoraSpec("far", Family.SDXL, "org/far/sub/file.safetensors"),
        LoraSpec("lost", Family.SD15, str(tmp_path / "lost.safetensors")),
    ]
    monkeypatch.setattr(lora_files, "catalogued_loras", lambda: tuple(specs))
    return specs


def make(folder: Path, **settings: Any) -> Settings:
    return load_settings(lora_dir=folder, **settings)


def message(folder: Path, name: str, **settings: Any) -> str:
    with pytest.raises(InvalidParameter) as caught:
        locate(name, make(folder, **settings))
    assert caught.value.param == "lora"
    return caught.value.message


# The folder and the catalogue


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("outline", "outline"),
        ("outline.safetensors", "outline"),
        ("styles/ink", "styles/ink"),
        ("styles/ink.safetensors", "styles/ink"),
        ("ink", "styles/ink"),
        ("v1.5", "styles/v1.5"),
        ("a/twin", "a/twin"),
        ("trained", "trained"),
        ("trained/pytorch_lora_weights", "trained"),
        (f"trained/{STEM}", "trained"),
    ],
)
def test_names_of_the_folder(name: str, canonical: str, folder: Path) -> None:
    settings = make(folder)
    source = locate(name, settings)
    assert is_known(name, settings)
    assert source.name == canonical
    assert read(source, settings).metadata == {"marker": canonical}


def test_a_name_that_means_two_files_is_ambiguous(folder: Path) -> None:
    assert message(folder, "twin") == "the LoRA name 'twin' is ambiguous: a/twin, b/twin"
    assert is_known("twin", make(folder))


def test_a_file_and_a_folder_of_one_name(folder: Path) -> None:
    put(folder / "outline" / STEM, "inner")
    settings = make(folder)
    assert read(locate("outline", settings), settings).metadata["marker"] == "outline"
    inner = locate("outline/pytorch_lora_weights", settings)
    assert read(inner, settings).metadata["marker"] == "inner"


@pytest.mark.parametrize(
    "name", ["../bundled", "styles/../outline", "./outline", "/outline", "styles", "OUTLINE", ""]
)
def test_a_name_is_never_taken_as_a_path_in_the_folder(name: str, folder: Path) -> None:
    settings = make(folder, allow_any_model=False, allow_lora_hub=False)
    assert not is_known(name, settings)
    with pytest.raises(InvalidParameter, match="there is no LoRA"):
        locate(name, settings)


def test_the_folder_is_listed_anew(folder: Path) -> None:
    settings = make(folder)
    assert not is_known("late", settings)
    put(folder / "late.safetensors")
    assert is_known("late", settings)
    (folder / "late.safetensors").unlink()
    assert not is_known("late", settings)


def test_links_may_lead_anywhere_but_not_in_circles(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "linked.safetensors")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder)
    (folder / "broken.safetensors").symlink_to(tmp_path / "nowhere")
    settings = make(folder)
    assert locate("linked", settings).name == "more/linked"
    assert "broken" not in known_names(settings)


def test_no_folder_no_names(tmp_path: Path) -> None:
    assert known_names(make(tmp_path / "none")) == ["Bundled", "far", "lost"]


@pytest.mark.parametrize("name", ["Bundled", "bundled", "bd"])
def test_names_of_the_catalogue(name: str, folder: Path) -> None:
    settings = make(folder)
    source = locate(name, settings)
    assert is_known(name, settings)
    assert (source.name, source.family) == ("Bundled", Family.SD15)
    assert read(source, settings).tensors.keys() == TENSORS.keys()


def test_the_catalogue_may_name_the_hub_whatever_requests_may(folder: Path) -> None:
    source = locate("far", make(folder, allow_lora_hub=False, allow_any_model=False))
    assert source == LoraSource("far", HubFile("org/far", "sub/file.safetensors"), Family.SDXL)


def test_a_catalogued_file_that_is_gone_is_no_fault_of_the_request(folder: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="LoRA lost: its file cannot be read"):
        locate("lost", make(folder))


def test_a_changed_file_is_another_source(folder: Path) -> None:
    settings = make(folder)
    before = locate("outline", settings)
    assert locate("outline.safetensors", settings) == before
    put(folder / "outline.safetensors", "of another length")
    assert locate("outline", settings) != before


def test_the_nearest_names_are_told(folder: Path, tmp_path: Path) -> None:
    assert nearest("outlin", make(folder)).startswith("; the nearest: outline")
    assert "there is no LoRA 'outlin'; the nearest: outline" in message(folder, "outlin")
    assert nearest("???", make(tmp_path / "none")) == "; the nearest: Bundled, far, lost"


def test_a_server_without_loras_says_so(tmp_path: Path, catalogued: list[LoraSpec]) -> None:
    catalogued.clear()
    assert nearest("x", make(tmp_path / "none")) == "; this server has none of its own"


# Paths


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_a_local_path(suffix: str, folder: Path, tmp_path: Path) -> None:
    path = put(tmp_path / "far" / "away.safetensors", "away")
    name = f"{path.with_suffix('')}{suffix}"
    settings = make(folder)
    assert read(locate(name, settings), settings).metadata["marker"] == "away"
    assert not is_known(name, settings)
    assert "SDBENTO_ALLOW_ANY_MODEL" in message(folder, name, allow_any_model=False)


def test_a_folder_that_diffusers_wrote(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "run" / STEM)
    assert locate(str(tmp_path / "run"), make(folder)).place == tmp_path / "run" / STEM


def test_the_folder_comes_before_paths_and_these_before_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = make(folder)
    assert locate("org/name", settings).place == HubFile("org/name", None)
    path = put(tmp_path / "org" / "name.safetensors")
    assert locate("org/name", settings).place == path
    listed = put(folder / "org" / "name.safetensors")
    assert locate("org/name", settings).place == listed


@pytest.mark.parametrize("name", ["x" * 500, "a/" + "b" * 400, "nul\0", "~", "."])
def test_names_that_are_no_paths(name: str, folder: Path) -> None:
    assert "there is no LoRA" in message(folder, name, allow_lora_hub=False)


@pytest.mark.parametrize("name", ["pickled.pt", "org/repo/x.bin", "/tmp/x.ckpt", "X.PT"])
def test_pickles_are_refused(name: str, folder: Path) -> None:
    assert "pickled weights can run code" in message(folder, name)


# URLs


def test_a_url_is_fetched_where_that_is_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(url: str, settings: Settings, **limits: Any) -> bytes:
        asked.append((url, limits))
        return safetensors.torch.save(TENSORS, metadata={"marker": "url"})

    monkeypatch.setattr(lora_files, "fetch", fetch)
    settings = make(folder, allow_lora_urls=True)
    source = locate("https://a.example/x.safetensors?token=secret", settings)
    assert source.name == "https://a.example/x.safetensors"
    file = read(source, settings)
    assert file.metadata == {"marker": "url"}
    assert torch.equal(*(t["unet.x.lora_A.weight"] for t in (file.tensors, TENSORS)))
    limits = {"max_bytes": lora_files.MAX_LORA_BYTES, "param": "lora"}
    assert asked == [("https://a.example/x.safetensors?token=secret", limits)]


def test_urls_are_refused_where_they_are_not_allowed(folder: Path) -> None:
    told = message(folder, "https://a.example/x?token=secret")
    assert "SDBENTO_ALLOW_LORA_URLS" in told
    assert "secret" not in told


def test_urls_of_pickles_are_refused(folder: Path) -> None:
    url = "https://a.example/x.bin?download=true"
    assert "pickled" in message(folder, url, allow_lora_urls=True)


def test_a_url_that_is_none(folder: Path) -> None:
    assert "not valid" in message(folder, "https://[x", allow_lora_urls=True)


# The Hub


class FakeHub:
    """One repository; `error` stands for one that cannot be had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, *files: str) -> None:
        self.root, self.sizes = root, dict.fromkeys(files, 100)
        self.error: Exception | None = None
        self.is_cached = False
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(lora_files, "HfApi", lambda: self)
        monkeypatch.setattr(lora_files, "hf_hub_download", self.download)
        monkeypatch.setattr(lora_files, "snapshot_download", self.snapshot)
        for file in files:
            put(root / file, file)

    def model_info(self, repo: str, *, files_metadata: bool) -> Any:
        assert repo == "org/repo"
        assert files_metadata
        if self.error is not None:
            raise self.error
        siblings = [SimpleNamespace(rfilename=f, size=size) for f, size in self.sizes.items()]
        return SimpleNamespace(siblings=siblings)

    def download(self, repo: str, file: str) -> str:
        return str(self.root / file)

    def snapshot(self, repo: str, *, local_files_only: bool, ignore_patterns: str) -> str:
        assert local_files_only
        if not self.is_cached:
            raise LocalEntryNotFoundError("not cached")
        return str(self.root)


def not_found() -> RepositoryNotFoundError:
    return RepositoryNotFoundError.__new__(RepositoryNotFoundError)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    return FakeHub(monkeypatch, tmp_path / "repo", "one.safetensors", "sub/two.safetensors")


def read_name(folder: Path, name: str, **settings: Any) -> Mapping[str, str]:
    given = make(folder, **settings)
    return read(locate(name, given), given).metadata


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("org/repo/one", "one.safetensors"),
        ("org/repo/one.safetensors", "one.safetensors"),
        ("org/repo/sub/two", "sub/two.safetensors"),
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_a_file_of_a_repository(
    name: str, file: str, offline: bool, folder: Path, hub: FakeHub
) -> None:
    hub.is_cached = offline
    assert read_name(folder, name, offline=offline) == {"marker": file}


def test_the_file_of_a_repository_that_is_meant(folder: Path, hub: FakeHub) -> None:
    with pytest.raises(InvalidParameter, match=r"say which file .* org/repo/one\.safetensors"):
        read_name(folder, "org/repo")
    hub.sizes[STEM] = 100
    put(hub.root / STEM, STEM)
    assert read_name(folder, "org/repo") == {"marker": STEM}
    hub.sizes = {"one.safetensors": 100, "other.bin": 1}
    assert read_name(folder, "org/repo") == {"marker": "one.safetensors"}
    hub.sizes = {"other.bin": 1}
    with pytest.raises(UnsupportedModel, match=r"org/repo has no \.safetensors file"):
        read_name(folder, "org/repo")


def test_a_file_that_the_repository_lacks(folder: Path, hub: FakeHub) -> None:
    with pytest.raises(InvalidParameter, match=r"as in org/repo/one\.safetensors"):
        read_name(folder, "org/repo/../../../etc/one")


def test_a_repository_that_is_not_there(folder: Path, hub: FakeHub) -> None:
    hub.error = not_found()
    with pytest.raises(InvalidParameter, match="there is no LoRA 'org/repo'; the nearest"):
        read_name(folder, "org/repo")


def test_without_a_network_the_cache_is_used(folder: Path, hub: FakeHub) -> None:
    hub.error = httpx.ConnectError("no network")
    with pytest.raises(SDBentoError, match="LoRA org/repo/one: a network request failed"):
        read_name(folder, "org/repo/one")
    hub.is_cached = True
    assert read_name(folder, "org/repo/one") == {"marker": "one.safetensors"}


def test_offline_only_the_cache_is_used(folder: Path, hub: FakeHub) -> None:
    hub.error = AssertionError("asked the Hub")
    with pytest.raises(ModelLoadFailed, match="LoRA org/repo/one is not on this machine"):
        read_name(folder, "org/repo/one", offline=True)
    hub.is_cached = True
    with pytest.raises(ModelLoadFailed, match="not on this machine"):
        read_name(folder, "org/repo/three", offline=True)
    with pytest.raises(InvalidParameter, match="say which file"):
        read_name(folder, "org/repo", offline=True)


def test_the_hub_is_refused_where_it_is_not_allowed(folder: Path) -> None:
    assert "SDBENTO_ALLOW_LORA_HUB" in message(folder, "org/repo", allow_lora_hub=False)


def test_a_file_too_large_is_not_downloaded(folder: Path, hub: FakeHub) -> None:
    hub.sizes["one.safetensors"] = lora_files.MAX_LORA_BYTES + 1
    with pytest.raises(TooLarge, match="the limit is 1500000000"):
        read_name(folder, "org/repo/one")


# Files


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a safetensors file",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 90)
        + json.dumps(
            {"x": {"dtype": "F32", "shape": [10**12, 10**6], "data_offsets": [0, 4 * 10**18]}}
        ).encode(),
        safetensors.torch.save(TENSORS)[:-1],
    ],
)
@pytest.mark.parametrize("by_url", [False, True])
def test_damaged_files_are_refused(
    content: bytes, by_url: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "damaged.safetensors").write_bytes(content)
    monkeypatch.setattr(lora_files, "fetch", lambda *_, **__: content)
    settings = make(folder, allow_lora_urls=True)
    source = locate("damaged", settings)
    if by_url:
        source = LoraSource("damaged", Url("https://a.example"))
    with pytest.raises(UnsupportedModel, match="no safetensors file, or a damaged one") as caught:
        read(source, settings)
    assert caught.value.param == "lora"


def test_a_file_too_large_is_not_read(folder: Path) -> None:
    with (folder / "outline.safetensors").open("r+b") as file:
        file.truncate(lora_files.MAX_LORA_BYTES + 1)  # a sparse file takes no room
    with pytest.raises(TooLarge, match="LoRA outline has 1500000001 bytes"):
        read_name(folder, "outline")


def test_a_file_that_vanishes_is_an_error_of_its_own(folder: Path) -> None:
    settings = make(folder)
    source = locate("outline", settings)
    (folder / "outline.safetensors").unlink()
    with pytest.raises(ModelLoadFailed, match="LoRA outline: its file cannot be read"):
        read(source, settings)
