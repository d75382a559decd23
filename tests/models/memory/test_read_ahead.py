"""`sdbento.models.memory.read_ahead`: files are in the page cache before they are needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from sdbento.catalog.families import Family
from sdbento.models import weights
from sdbento.models.memory import read_ahead
from tests.support.loading import load, resolve, settings
from tests.support.tiny import save_tiny

MB = 2**20


def write(file: Path, num_bytes: int) -> Path:
    """A file of which nothing is in the page cache."""
    file.write_bytes(os.urandom(num_bytes))
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return file


def is_cached(file: Path) -> list[bool]:
    """Of each MB of the file, whether its first page is in the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = file.stat().st_size
        return [read_ahead._is_cached(descriptor, offset) for offset in range(0, size, MB)]
    finally:
        os.close(descriptor)


def test_all_parts_of_all_files_are_read(tmp_path: Path) -> None:
    files = [write(tmp_path / "unet", 21 * MB + 5), write(tmp_path / "vae", 3 * MB)]
    if any(map(any, map(is_cached, files))):
        pytest.skip("this file system keeps what it is asked to drop")
    for thread in read_ahead.read_ahead(files):
        thread.join()
    assert all(map(all, map(is_cached, files)))


def test_files_that_memory_cannot_hold_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "unet", 3 * MB)
    monkeypatch.setattr(read_ahead, "host_memory", lambda: (100 * MB, 5 * MB))
    assert read_ahead.read_ahead([file]) == []


def test_a_file_that_cannot_be_read_is_left_to_whoever_opens_it(tmp_path: Path) -> None:
    there = write(tmp_path / "there", MB)
    for thread in read_ahead.read_ahead([tmp_path / "missing", tmp_path, there]):
        thread.join()


def test_a_model_s_weights_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def note(files: Sequence[Path]) -> None:
        seen.extend(file.relative_to(tmp_path).as_posix() for file in files)

    monkeypatch.setattr(weights, "read_ahead", note)
    load(resolve(save_tiny(Family.SD15, tmp_path)), settings())
    assert sorted(seen) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
