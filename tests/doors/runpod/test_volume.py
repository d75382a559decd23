"""RunPod's volume: which of its folders are used, and where downloads go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdbento.doors.runpod.volume import HUB_CACHE, hub_cache, use_volume
from sdbento.environment import load_settings
from tests.support.server import ROOT


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A volume, in an environment whose changes are undone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    folder = tmp_path / "volume"
    folder.mkdir()
    return folder


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere


def test_folders_of_the_volume_are_used_unless_others_are_set(volume: Path) -> None:
    (volume / "models").mkdir()
    (volume / "loras").mkdir()
    named = volume.parent / "mine"
    settings = use_volume(load_settings(runpod_volume=volume, lora_dir=named))
    assert settings.models_dir == volume / "models"
    assert settings.lora_dir == named
    assert settings.embeddings_dir == Path("embeddings")
    assert settings.prefer_cache
    assert os.environ["HF_HUB_CACHE"] == str(volume / HUB_CACHE)


def test_without_a_volume_nothing_changes(volume: Path) -> None:
    settings = load_settings(runpod_volume=volume / "none")
    assert use_volume(settings) == settings
    assert "HF_HUB_CACHE" not in os.environ


def test_downloads_go_to_the_volume(tmp_path: Path) -> None:
    assert hub_cache(tmp_path, tmp_path / "own") == tmp_path / HUB_CACHE
    assert not (tmp_path / "own").exists()


@pytest.mark.usefixtures("read_only")
def test_models_that_can_only_be_read_are_linked_into_a_cache_that_can_be_written(
    tmp_path: Path,
) -> None:
    own = tmp_path / "own"
    assert hub_cache(tmp_path / "volume", own) is None
    model = tmp_path / "volume" / HUB_CACHE / "models--org--name"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (own / "models--org--here").mkdir(parents=True)
    (own / model.name).symlink_to(tmp_path / "a-volume-that-was-there-before")
    for _ in range(2):
        assert hub_cache(tmp_path / "volume", own) == own
    assert (own / model.name / "config.json").read_text() == "{}"
    assert {path.name for path in own.iterdir()} == {"models--org--here", model.name}


@pytest.mark.usefixtures("read_only")
def test_the_cache_is_used_where_nothing_can_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / HUB_CACHE
    (cache / "models--org--name").mkdir(parents=True)
    own = tmp_path / "a-file"
    own.write_text("")
    assert hub_cache(tmp_path, own) == cache
    assert "nothing can be downloaded" in caplog.text


@pytest.mark.parametrize(("variable", "value"), [("", ""), ("HF_HOME", "/elsewhere")])
def test_the_hub_library_uses_the_volume_unless_another_folder_is_set(
    variable: str, value: str, tmp_path: Path
) -> None:
    code = (
        "import sys; from sdbento.environment import load_settings; "
        "import sdbento.doors.runpod.volume as v; "
        "import sdbento.doors.runpod.worker, sdbento.doors.cli.commands; "
        "assert 'huggingface_hub' not in sys.modules; "
        "v.use_volume(load_settings()); "
        "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    )
    environment = {"PATH": "/usr/bin:/bin", "SDBENTO_RUNPOD_VOLUME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment | ({variable: value} if variable else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    home = value or str(tmp_path / "huggingface-cache")
    assert ran.stdout.split()[-1] == f"{home}/hub"
