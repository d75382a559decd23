"""`sdbento keys`, as a person uses it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from sdbento.access.entries import hash_of, read
from sdbento.doors.cli.commands import main
from sdbento.doors.cli.keys import keys


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "keys.yaml"
    monkeypatch.setenv("SDBENTO_API_KEYS", str(path))
    return path


def test_a_key_is_printed_once_listed_without_it_and_removed(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ["--requests-per-minute", "60", "--images-at-once", "4", "--model", "shapes"]
    assert main(["keys", "add", "alice", *limits]) == 0
    key = capsys.readouterr().out.strip()
    assert read(file)[0].hash == hash_of(key)
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert "alice" in listed and "requests_per_minute=60" in listed and "models=shapes" in listed
    assert key not in listed and "sha256" not in listed
    assert main(["keys", "remove", "alice"]) == 0
    assert main(["keys", "remove", "alice"]) == 1
    assert "no key 'alice'" in capsys.readouterr().err


def test_a_password_is_asked_for_and_not_printed(file: Path) -> None:
    ran = CliRunner().invoke(keys, ["add", "bob", "--password"], input="tulips\ntulips\n")
    assert ran.exit_code == 0, ran.output
    assert "tulips" not in ran.output
    assert read(file)[0].is_password


def test_a_file_must_be_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "add", "alice"]) == 1
    assert "SDBENTO_API_KEYS" in capsys.readouterr().err
    assert main(["keys", "add", "alice", "--file", str(tmp_path / "new" / "keys.yaml")]) == 0


def test_a_server_is_not_started_with_a_file_that_cannot_be_read(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", "shapes"]) == 1
    assert "no such file; `sdbento keys add NAME` makes it" in capsys.readouterr().err
