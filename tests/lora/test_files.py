"""Files of LoRAs: read from the disk, fetched from a URL, downloaded from the Hub or its cache."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from sdbento.catalog import hub as hub_module
from sdbento.catalog.downloads.process import HubError, HubProcess, Listing, RemoteFile
from sdbento.environment import load_settings
from sdbento.errors import (
    InvalidParameter,
    ModelLoadFailed,
    SDBentoError,
    TooLarge,
    UnknownModel,
    UnsupportedModel,
)
from sdbento.lora import files as lora_files
from sdbento.lora.files import LoraFile, fetch_lora, read
from sdbento.lora.lookup import HubFile, LoraSource, Url, locate
from sdbento.settings import Settings
from tests.support.damage import damaged

TENSORS = {"unet.x.lora_A.weight": torch.arange(6.0).reshape(2, 3)}
STEM = "pytorch_lora_weights.safetensors"


def put(path: Path, marker: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(TENSORS, path, metadata={"marker": marker})
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "loras"
    put(root / "outline.safetensors", "outline")
    return root


def make(folder: Path, **settings: Any) -> Settings:
    return load_settings(**{"lora_dir": folder, "allow_any_model": True, **settings})


def read_name(folder: Path, name: str, **settings: Any) -> Mapping[str, str]:
    given = make(folder, **settings)
    return read(locate(name, given), given).metadata


# URLs


def test_a_url_is_fetched_where_that_is_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(url: str, settings: Settings, **limits: Any) -> bytes:
        asked.append((url, limits))
        return safetensors.torch.save(TENSORS, metadata={"marker": "url"})

    monkeypatch.setattr(lora_files, "fetch_blocking", fetch)
    settings = make(folder, allow_lora_urls=True)
    source = locate("https://a.example/x.safetensors?token=secret", settings)
    assert source.name == "https://a.example/x.safetensors"
    file = read(source, settings)
    assert file.metadata == {"marker": "url"}
    assert torch.equal(*(t["unet.x.lora_A.weight"] for t in (file.tensors, TENSORS)))
    limits = {"max_bytes": lora_files.MAX_LORA_BYTES, "param": "lora"}
    assert asked == [("https://a.example/x.safetensors?token=secret", limits)]


# The Hub


class FakeHub(HubProcess):
    """One repository; `error` stands for one that cannot be fetched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, *files: str) -> None:
        super().__init__()
        self.root, self.sizes = root, dict.fromkeys(files, 100)
        self.error: HubError | None = None
        self.is_cached = False
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_module, "cached_folder", self.cached_folder)
        for file in files:
            put(root / file, file)

    def list(self, repo: str) -> Listing:
        assert repo == "org/repo"
        if self.error is not None:
            raise self.error
        files = {file: RemoteFile(size, f"blob of {file}") for file, size in self.sizes.items()}
        return Listing(repo, "1" * 40, files)

    def get(self, listing: Listing, paths: Collection[str], whole: bool) -> Path:
        assert whole
        self.is_cached = True
        return self.root

    def cached_folder(self, repo: str) -> Path:
        if not self.is_cached:
            raise LocalEntryNotFoundError("not cached")
        return self.root


def not_found() -> HubError:
    return HubError(UnknownModel("no such model on the Hub, or it is private"), "absent")


def fetch_and_read(hub: FakeHub, folder: Path, name: str, **settings: Any) -> Mapping[str, str]:
    given = make(folder, **settings)
    source = locate(name, given)
    assert isinstance(source.place, HubFile)
    fetch_lora(source.name, source.place, given, hub)
    return read(source, given).metadata


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    return FakeHub(monkeypatch, tmp_path / "repo", "one.safetensors", "sub/two.safetensors")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("org/repo/one", "one.safetensors"),
        ("org/repo/one.safetensors", "one.safetensors"),
        ("org/repo/sub/two", "sub/two.safetensors"),
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_a_file_of_a_repository_is_read(
    name: str, file: str, offline: bool, folder: Path, hub: FakeHub
) -> None:
    hub.is_cached = offline
    assert fetch_and_read(hub, folder, name, offline=offline) == {"marker": file}


def test_a_repository_with_several_files_needs_the_name_of_one(folder: Path, hub: FakeHub) -> None:
    with pytest.raises(InvalidParameter, match=r"say which file .* org/repo/one\.safetensors"):
        fetch_and_read(hub, folder, "org/repo")
    hub.sizes[STEM] = 100
    put(hub.root / STEM, STEM)
    assert fetch_and_read(hub, folder, "org/repo") == {"marker": STEM}
    (hub.root / STEM).unlink()
    (hub.root / "sub/two.safetensors").unlink()
    hub.sizes = {"one.safetensors": 100, "other.bin": 1}
    assert fetch_and_read(hub, folder, "org/repo") == {"marker": "one.safetensors"}
    hub.sizes = {"other.bin": 1}
    with pytest.raises(UnsupportedModel, match=r"org/repo has no \.safetensors file"):
        fetch_and_read(hub, folder, "org/repo")


def test_a_file_that_the_repository_lacks_is_refused(folder: Path, hub: FakeHub) -> None:
    with pytest.raises(InvalidParameter, match=r"as in org/repo/one\.safetensors"):
        fetch_and_read(hub, folder, "org/repo/../../../etc/one")


def test_an_unknown_repository_is_refused(folder: Path, hub: FakeHub) -> None:
    hub.error = not_found()
    with pytest.raises(InvalidParameter, match="there is no LoRA 'org/repo'; the nearest"):
        fetch_and_read(hub, folder, "org/repo")


def test_without_a_network_the_cache_is_used(folder: Path, hub: FakeHub) -> None:
    hub.error = HubError(ModelLoadFailed("the Hub cannot be reached"), "away")
    with pytest.raises(ModelLoadFailed, match="LoRA org/repo/one: the Hub cannot be reached"):
        fetch_and_read(hub, folder, "org/repo/one")
    hub.is_cached = True
    assert fetch_and_read(hub, folder, "org/repo/one") == {"marker": "one.safetensors"}


def test_offline_only_the_cache_is_used(folder: Path, hub: FakeHub) -> None:
    hub.error = HubError(ModelLoadFailed("was asked"), "refused")
    with pytest.raises(ModelLoadFailed, match="LoRA org/repo/one is not on this machine"):
        fetch_and_read(hub, folder, "org/repo/one", offline=True)
    hub.is_cached = True
    with pytest.raises(ModelLoadFailed, match="not on this machine"):
        fetch_and_read(hub, folder, "org/repo/three", offline=True)
    with pytest.raises(InvalidParameter, match="say which file"):
        fetch_and_read(hub, folder, "org/repo", offline=True)


def test_a_file_that_is_too_large_is_not_downloaded(folder: Path, hub: FakeHub) -> None:
    hub.sizes["one.safetensors"] = lora_files.MAX_LORA_BYTES + 1
    with pytest.raises(TooLarge, match="the limit is 1500000000"):
        fetch_and_read(hub, folder, "org/repo/one")


# Files on the disk


def test_a_file_of_the_folder(folder: Path) -> None:
    settings = make(folder)
    file = read(locate("outline", settings), settings)
    assert file.metadata == {"marker": "outline"}
    assert file.tensors.keys() == TENSORS.keys()


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
    monkeypatch.setattr(lora_files, "fetch_blocking", lambda *_, **__: content)
    settings = make(folder, allow_lora_urls=True)
    source = locate("damaged", settings)
    if by_url:
        source = LoraSource("damaged", Url("https://a.example"))
    with pytest.raises(UnsupportedModel, match="no safetensors file, or a damaged one") as caught:
        read(source, settings)
    assert caught.value.param == "lora"


def test_a_file_that_is_too_large_is_not_read(folder: Path) -> None:
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


# Damaged and hostile files

JSON = st.recursive(
    st.none() | st.integers() | st.sampled_from(["F32", "BF16", "", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("a"), inner),
    max_leaves=4,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "I64", "BOOL", "F8_E4M3", "F4", "Q9"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**64), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 2**64) | st.integers(0, 32), max_size=3) | JSON,
    },
)
HEADERS = st.dictionaries(st.sampled_from(["__metadata__", "a", "b.c"]), ENTRY | JSON)


def with_header(header: str, length: int | None = None) -> bytes:
    text = header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(24)


@given(
    damaged(st.just(safetensors.torch.save(TENSORS, metadata={"marker": "x"})))
    | st.builds(with_header, HEADERS.map(json.dumps))
    | st.builds(with_header, st.just("{}"), st.integers(0, 2**64 - 1))
    | st.sampled_from([with_header(text) for text in ("[" * 9999, '{"a":' * 9999, "", "\0", "[]")])
)
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_files, "fetch_blocking", lambda *args, **limits: data)
        for place in (path, Url("https://a.example/x.safetensors")):
            outcome = outcome_of_reading(LoraSource("x", place))
            if isinstance(outcome, SDBentoError):
                assert outcome.status < 500 and "x" in outcome.message
            else:
                assert all(isinstance(value, str) for value in outcome.metadata.values())


def outcome_of_reading(source: LoraSource) -> LoraFile | SDBentoError:
    try:
        return read(source, Settings())
    except SDBentoError as error:
        return error
