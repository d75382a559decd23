"""The seven kinds of LoRA names, and which of them a request may use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdbento.catalog.families import Family
from sdbento.catalog.specs import LoraSpec
from sdbento.environment import load_settings
from sdbento.errors import InvalidParameter, ModelLoadFailed
from sdbento.lora import lookup
from sdbento.lora.lookup import HubFile, LoraSource, Url, is_known, known, locate, nearest
from sdbento.settings import Settings

STEM = "pytorch_lora_weights.safetensors"


def put(path: Path, content: bytes = b"no lookup reads it") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "loras"
    for name in ("outline", "styles/ink", "styles/v1.5", "a/twin", "b/twin"):
        put(root / f"{name}.safetensors")
    put(root / "trained" / STEM)
    put(root / "pickled.pt")
    return root


@pytest.fixture(autouse=True)
def catalogued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LoraSpec]:
    specs = [
        LoraSpec("Bundled", Family.SD15, str(put(tmp_path / "bundled.safetensors")), ("bd",)),
        LoraSpec("far", Family.SDXL, "org/far/sub/file.safetensors"),
        LoraSpec("lost", Family.SD15, str(tmp_path / "lost.safetensors")),
    ]
    monkeypatch.setattr(lookup, "catalogued_loras", lambda: tuple(specs))
    return specs


def make(folder: Path, **settings: Any) -> Settings:
    return load_settings(**{"lora_dir": folder, "allow_any_model": True, **settings})


def message(folder: Path, name: str, **settings: Any) -> str:
    with pytest.raises(InvalidParameter) as caught:
        locate(name, make(folder, **settings))
    assert caught.value.param == "lora"
    return caught.value.message


# The folder and the catalogue


@pytest.mark.parametrize(
    ("name", "canonical", "file"),
    [
        ("outline", "outline", "outline.safetensors"),
        ("outline.safetensors", "outline", "outline.safetensors"),
        ("styles/ink", "styles/ink", "styles/ink.safetensors"),
        ("styles/ink.safetensors", "styles/ink", "styles/ink.safetensors"),
        ("ink", "styles/ink", "styles/ink.safetensors"),
        ("v1.5", "styles/v1.5", "styles/v1.5.safetensors"),
        ("a/twin", "a/twin", "a/twin.safetensors"),
        ("trained", "trained", f"trained/{STEM}"),
        ("trained/pytorch_lora_weights", "trained", f"trained/{STEM}"),
        (f"trained/{STEM}", "trained", f"trained/{STEM}"),
    ],
)
def test_names_of_the_folder_are_found(name: str, canonical: str, file: str, folder: Path) -> None:
    settings = make(folder)
    source = locate(name, settings)
    assert is_known(name, settings)
    assert (source.name, source.place) == (canonical, folder / file)


def test_a_name_that_means_two_files_is_ambiguous(folder: Path) -> None:
    assert message(folder, "twin") == "the LoRA name 'twin' is ambiguous: a/twin, b/twin"
    assert is_known("twin", make(folder))


def test_a_file_and_a_folder_may_share_a_name(folder: Path) -> None:
    inner = put(folder / "outline" / STEM)
    settings = make(folder)
    assert locate("outline", settings).place == folder / "outline.safetensors"
    assert locate("outline/pytorch_lora_weights", settings).place == inner


@pytest.mark.parametrize(
    "name", ["../bundled", "styles/../outline", "./outline", "/outline", "styles", "OUTLINE", ""]
)
def test_a_name_is_never_read_as_a_path_in_the_folder(name: str, folder: Path) -> None:
    settings = make(folder, allow_any_model=False, allow_lora_hub=False)
    assert not is_known(name, settings)
    with pytest.raises(InvalidParameter, match="there is no LoRA"):
        locate(name, settings)


def test_the_folder_is_listed_again_after_a_change(folder: Path) -> None:
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
    assert "broken" not in known(settings)


def test_without_a_folder_there_are_no_names(tmp_path: Path) -> None:
    assert [*known(make(tmp_path / "none"))] == ["Bundled", "far", "lost"]


@pytest.mark.parametrize("name", ["Bundled", "bundled", "bd"])
def test_names_of_the_catalogue_are_found(name: str, folder: Path, tmp_path: Path) -> None:
    settings = make(folder)
    source = locate(name, settings)
    assert is_known(name, settings)
    assert (source.name, source.family) == ("Bundled", Family.SD15)
    assert source.place == tmp_path / "bundled.safetensors"


def test_the_catalogue_may_name_the_hub_whatever_requests_may(folder: Path) -> None:
    source = locate("far", make(folder, allow_lora_hub=False, allow_any_model=False))
    assert source == LoraSource("far", HubFile("org/far", "sub/file.safetensors"), Family.SDXL)


def test_a_missing_catalogued_file_is_not_the_fault_of_the_request(folder: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="LoRA lost: its file cannot be read"):
        locate("lost", make(folder))


def test_a_changed_file_is_another_source(folder: Path) -> None:
    settings = make(folder)
    before = locate("outline", settings)
    assert locate("outline.safetensors", settings) == before
    put(folder / "outline.safetensors", b"of another length")
    assert locate("outline", settings) != before


def test_an_unknown_name_is_refused_with_the_nearest_ones(folder: Path, tmp_path: Path) -> None:
    assert nearest("outlin", make(folder)).startswith("; the nearest: outline")
    assert "there is no LoRA 'outlin'; the nearest: outline" in message(folder, "outlin")
    assert nearest("???", make(tmp_path / "none")) == "; the nearest: Bundled, far, lost"


def test_a_server_without_loras_says_so(tmp_path: Path, catalogued: list[LoraSpec]) -> None:
    catalogued.clear()
    assert nearest("x", make(tmp_path / "none")) == "; this server has none of its own"


# Paths


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_a_local_path_is_read_where_any_model_is_allowed(
    suffix: str, folder: Path, tmp_path: Path
) -> None:
    path = put(tmp_path / "far" / "away.safetensors")
    name = f"{path.with_suffix('')}{suffix}"
    settings = make(folder)
    assert locate(name, settings).place == path
    assert not is_known(name, settings)
    assert "SDBENTO_ALLOW_ANY_MODEL" in message(folder, name, allow_any_model=False)


def test_a_folder_written_by_diffusers_is_read(folder: Path, tmp_path: Path) -> None:
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
def test_names_that_cannot_be_paths_are_unknown(name: str, folder: Path) -> None:
    assert "there is no LoRA" in message(folder, name, allow_lora_hub=False)


@pytest.mark.parametrize("name", ["pickled.pt", "org/repo/x.bin", "/tmp/x.ckpt", "X.PT"])
def test_pickles_are_refused(name: str, folder: Path) -> None:
    assert "pickled weights can run code" in message(folder, name)


# URLs


def test_a_url_is_a_place_where_that_is_allowed(folder: Path) -> None:
    url = "https://a.example/x.safetensors?token=secret"
    source = locate(url, make(folder, allow_lora_urls=True))
    assert source == LoraSource("https://a.example/x.safetensors", Url(url))


def test_urls_are_refused_where_they_are_not_allowed(folder: Path) -> None:
    refusal = message(folder, "https://a.example/x?token=secret")
    assert "SDBENTO_ALLOW_LORA_URLS" in refusal
    assert "secret" not in refusal


def test_urls_of_pickles_are_refused(folder: Path) -> None:
    url = "https://a.example/x.bin?download=true"
    assert "pickled" in message(folder, url, allow_lora_urls=True)


def test_an_invalid_url_is_refused(folder: Path) -> None:
    assert "not valid" in message(folder, "https://[x", allow_lora_urls=True)


# The Hub


@pytest.mark.parametrize(
    ("name", "file"),
    [("org/repo", None), ("org/repo/one", "one"), ("org/repo/sub/two", "sub/two")],
)
def test_a_repository_or_a_file_of_it(name: str, file: str | None, folder: Path) -> None:
    assert locate(name, make(folder)) == LoraSource(name, HubFile("org/repo", file))


def test_loras_of_named_owners_only(folder: Path) -> None:
    settings = make(folder, hub_owners="Acme,org/repo", allow_any_model=False)
    for name in ("acme/x", "org/repo/one"):
        assert isinstance(locate(name, settings).place, HubFile)
    for name in ("other/x", "org/repo2", "acmes/x/y"):
        refused = message(folder, name, hub_owners="Acme,org/repo", allow_any_model=False)
        assert "SDBENTO_HUB_OWNERS" in refused


def test_the_hub_is_refused_where_it_is_not_allowed(folder: Path) -> None:
    assert "SDBENTO_ALLOW_LORA_HUB" in message(folder, "org/repo", allow_lora_hub=False)
