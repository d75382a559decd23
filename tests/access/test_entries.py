"""The file of keys: what may stand in it, and how it is changed."""

from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdbento.access import entries
from sdbento.access.entries import PREFIX, hash_of, read
from sdbento.settings import SettingsError

HASH = hash_of("sesame")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_a_key_is_drawn_and_only_its_hash_is_kept(file: Path) -> None:
    key = entries.add(file, "alice", requests_per_minute=5, models=["shapes"])
    assert key is not None and key.startswith(PREFIX) and len(key) >= 40
    [entry] = read(file)
    assert (entry.name, entry.hash) == ("alice", hash_of(key))
    assert entry.allowance.requests_per_minute == 5
    assert entry.allowance.models == frozenset({"shapes"})
    assert key not in file.read_text()
    assert entry.hash not in repr(entry)


def test_a_password_is_hashed_by_argon2(file: Path) -> None:
    assert entries.add(file, "bob", "correct horse") is None
    [entry] = read(file)
    assert entry.is_password and entry.hash.startswith("$argon2id$")
    assert "horse" not in file.read_text()


def test_a_password_that_is_anothers_is_refused(file: Path) -> None:
    entries.add(file, "alice")
    entries.add(file, "bob", "correct horse")
    with pytest.raises(SettingsError, match="another user has this password"):
        entries.add(file, "carol", "correct horse")
    entries.add(file, "carol", "correct horses")
    assert [entry.name for entry in read(file)] == ["alice", "bob", "carol"]


def test_only_the_owner_can_read_the_file(file: Path) -> None:
    file.write_text("[]")
    file.chmod(0o644)
    entries.add(file, "alice")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_json_is_read_as_well(file: Path) -> None:
    file.write_text(json.dumps([{"name": "a", "hash": HASH, "images_at_once": 2}]))
    assert read(file)[0].allowance.images_at_once == 2


def test_a_link_stays_one(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    entries.add(link, "alice")
    assert link.is_symlink() and [entry.name for entry in read(file)] == ["alice"]


def test_many_changes_at_once_are_all_kept(file: Path) -> None:
    names = [f"user-{i}" for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: entries.add(file, name), names))
    assert sorted(entry.name for entry in read(file)) == sorted(names)
    assert {path.name for path in file.parent.iterdir()} == {"keys.yaml", "keys.yaml.lock"}


def test_keys_are_removed_by_name(file: Path) -> None:
    entries.add(file, "alice")
    entries.add(file, "bob")
    entries.remove(file, "alice")
    assert [entry.name for entry in read(file)] == ["bob"]
    with pytest.raises(SettingsError, match="no key 'alice'"):
        entries.remove(file, "alice")
    with pytest.raises(SettingsError, match="has a key 'bob' already"):
        entries.add(file, "bob")


@pytest.mark.parametrize("name", ["", "default", "a b", "-a", "a" * 65, "ä", "a\n", "a/b", "\0"])
def test_names_that_cannot_be_used_are_refused(file: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="name must be"):
        entries.add(file, name)
    assert not file.exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- [", "neither YAML nor JSON in line 1"),
        ("name: a", "valid list"),
        ("- a", "entry 1"),
        ("- name: a", "entry 1 hash"),
        (f"- {{name: a, hash: '{HASH}', limit: 3}}", "entry 1 limit"),
        (f"- {{name: a, hash: '{HASH}', requests_per_minute: 0}}", "requests_per_minute"),
        (f"- {{name: a, hash: '{HASH}', models: shapes}}", "models"),
        ("- {name: a, hash: secret-in-clear}", "sha256:HEX or an argon2 hash"),
        ("- {name: a, hash: 'sha256:abc'}", "sha256:HEX"),
        ("- {name: a, hash: '$argon2id$v=19$m=99999999,t=3,p=4$c2FsdHNhbHQ$aGFzaA'}", "argon2"),
        (f"- {{name: a, hash: '{HASH}'}}\n- {{name: a, hash: '{HASH}'}}", "are called a"),
        (f"- {{name: a, hash: '{HASH}'}}\n- {{name: b, hash: '{HASH}'}}", "a and b have the same"),
        ("- {name: default, hash: x}", "not 'default'"),
    ],
)
def test_a_bad_file_is_one_line_without_its_secrets(file: Path, text: str, problem: str) -> None:
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read(file)
    message = str(caught.value)
    assert message.startswith("SDBENTO_API_KEYS=") and "\n" not in message
    assert problem in message
    assert "secret-in-clear" not in message and HASH not in message


def test_a_missing_file_is_one_line_that_says_how_to_make_it(file: Path) -> None:
    with pytest.raises(SettingsError, match="`sdbento keys add NAME` makes it"):
        read(file)
