"""Listing of a folder of models, LoRAs or inversions."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdbento.catalog.folder import list_files


def put(root: Path, *files: str) -> None:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_files_of_the_folder_and_its_subfolders_are_listed_by_their_relative_paths(
    tmp_path: Path,
) -> None:
    put(tmp_path, "z.safetensors", "b/c/d.safetensors", "a/e.safetensors", "notes.txt", "k.pt")
    files = list_files(tmp_path, ".safetensors")
    assert [*files] == ["z.safetensors", "a/e.safetensors", "b/c/d.safetensors"]
    assert files["b/c/d.safetensors"] == tmp_path / "b/c/d.safetensors"
    assert "k.pt" in list_files(tmp_path, (".safetensors", ".pt"))


@pytest.mark.parametrize(("max_depth", "names"), [(0, ["x"]), (1, ["x", "a/x"])])
def test_a_search_can_be_limited_to_a_depth(
    max_depth: int, names: list[str], tmp_path: Path
) -> None:
    put(tmp_path, "x", "a/x", "a/b/x")
    assert [*list_files(tmp_path, "x", max_depth)] == names


def test_links_that_lead_in_a_circle_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path, "a/x")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert [*list_files(tmp_path, "x")] == ["a/x"]


def test_a_folder_may_be_listed_under_two_names(tmp_path: Path) -> None:
    put(tmp_path, "a/x")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert [*list_files(tmp_path, "x", max_depth=1)] == ["a/x", "b/x"]


def test_missing_entries_and_non_files_are_left_out(tmp_path: Path) -> None:
    assert list_files(tmp_path / "missing", "x") == {}
    (tmp_path / "folder.x").mkdir()
    (tmp_path / "broken.x").symlink_to(tmp_path / "nowhere")
    put(tmp_path, "file.x")
    assert [*list_files(tmp_path, ".x")] == ["file.x"]
    assert list_files(tmp_path / "file.x", "x") == {}
