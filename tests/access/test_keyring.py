"""Whose key it is: the single one, those of the file, passwords, and changes of the file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher

from sdbento.access import entries, keyring
from sdbento.access.caller import Caller
from sdbento.access.credentials import Credential
from sdbento.access.keyring import MAX_CHECKS, Keyring
from sdbento.errors import Overloaded, Unauthorized
from sdbento.settings import Settings, SettingsError

QUICK = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


@pytest.fixture(autouse=True)
def _looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(keyring, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(keyring, "PAUSE", 0.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def ring(file: Path | None = None, key: str | None = None) -> Keyring:
    return Keyring(Settings.model_validate({"api_key": key, "api_keys": file}))


async def whose(keys: Keyring, key: str, user: str | None = None) -> str | None:
    try:
        return (await keys.identify([Credential(key.encode(), user)])).name
    except Unauthorized:
        return None


async def test_without_keys_none_is_required() -> None:
    assert not ring().required


async def test_the_single_key_and_those_of_the_file_work_side_by_side(file: Path) -> None:
    alice = entries.add(file, "alice")
    assert alice is not None
    keys = ring(file, "sesame\n")
    assert keys.required and keys.shared
    assert await whose(keys, "sesame") == "default"
    assert await whose(keys, alice) == "alice"
    for wrong in ("", "sesame ", "Sesame", alice[:-1], alice + "x", "alice", "default", "\0"):
        assert await whose(keys, wrong) is None


async def test_a_single_key_shares_with_nobody() -> None:
    caller = await ring(key="sesame").identify([Credential(b"sesame")])
    assert not caller.shares


async def test_a_single_key_that_is_also_in_the_file_is_that_users(file: Path) -> None:
    key = entries.add(file, "alice", images_at_once=2)
    assert await whose(ring(file, key), str(key)) == "alice"


async def test_one_valid_key_of_two_is_enough() -> None:
    caller = await ring(key="sesame").identify([Credential(b"wrong"), Credential(b"sesame")])
    assert caller.name == "default"
    with pytest.raises(Unauthorized):
        await ring(key="sesame").identify([])


async def test_a_hash_is_not_a_key(file: Path) -> None:
    entries.add(file, "alice")
    [entry] = entries.read(file)
    assert await whose(ring(file), entry.hash) is None
    assert await whose(ring(file), entry.hash.removeprefix("sha256:")) is None


async def test_passwords_work_with_and_without_a_name(file: Path) -> None:
    for name in ("alice", "bob"):
        with_hash(file, name, QUICK.hash(f"{name}'s password"))
    keys = ring(file)
    assert await whose(keys, "bob's password") == "bob"
    assert await whose(keys, "bob's password", "bob") == "bob"
    assert await whose(keys, "bob's password", "alice") == "bob"  # the user's name is no secret
    assert await whose(keys, "eve's password", "alice") is None


async def test_of_users_with_the_same_password_each_is_himself(file: Path) -> None:
    for name in ("alice", "bob"):
        with_hash(file, name, QUICK.hash("same"))
    keys = ring(file)
    for _ in range(2):  # checked, then remembered
        for name in ("alice", "bob"):
            assert await whose(keys, "same", name) == name


def with_hash(file: Path, name: str, hash_: str) -> None:
    with file.open("a") as text:
        text.write(f"- name: {name}\n  hash: '{hash_}'\n")


async def test_a_password_is_checked_once_right_or_wrong(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_hash(file, "alice", QUICK.hash("right"))
    keys, checked = ring(file), []
    owner_of = keyring._owner_of

    def counting(credential: Credential, passwords: dict[str, object]) -> str | None:
        checked.append(credential.key)
        return owner_of(credential, passwords)  # type: ignore[arg-type]

    monkeypatch.setattr(keyring, "_owner_of", counting)
    right = await asyncio.gather(*(whose(keys, "right") for _ in range(5)))
    wrong = await asyncio.gather(*(whose(keys, "wrong") for _ in range(5)))
    assert (right, wrong) == (["alice"] * 5, [None] * 5)
    assert checked == [b"right", b"wrong"]


async def test_a_flood_of_wrong_keys_is_bounded_and_harms_no_random_key(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_key = entries.add(file, "bob")
    assert random_key is not None
    with_hash(file, "alice", QUICK.hash("right"))
    keys = ring(file)
    assert await whose(keys, "right") == "alice"
    monkeypatch.setattr(keyring, "PAUSE", 1e9)
    monkeypatch.setattr(keyring, "MAX_PAUSE", 1e9)  # the first wrong one keeps the others waiting
    flood = [asyncio.create_task(whose(keys, f"guess {i}")) for i in range(MAX_CHECKS)]
    await asyncio.sleep(0.05)
    with pytest.raises(Overloaded):
        await keys.identify([Credential(b"one more")])
    assert await whose(keys, random_key) == "bob"
    assert await whose(keys, "right") == "alice"  # remembered
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    assert len(keys._remembered) <= MAX_CHECKS


async def test_guesses_from_one_address_do_not_keep_a_password_from_another_out(file: Path) -> None:
    with_hash(file, "alice", QUICK.hash("right"))
    keys = ring(file)

    def guess(number: int) -> Coroutine[Any, Any, Caller]:
        return keys.identify([Credential(f"guess {number}".encode())], "192.0.2.1")

    flood = [asyncio.create_task(guess(number)) for number in range(20)]
    await asyncio.sleep(0)
    assert (await keys.identify([Credential(b"right")], "192.0.2.2")).name == "alice"
    errors = await asyncio.gather(*flood, return_exceptions=True)
    assert sum(isinstance(error, Overloaded) for error in errors) == 20 - MAX_CHECKS
    assert all(error.retry_after for error in errors if isinstance(error, Overloaded))
    assert not keys._checks.taken


async def test_a_random_key_is_found_behind_any_other_while_passwords_are_checked(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy's Authorization beside a key in X-API-Key."""
    key = entries.add(file, "bob")
    assert key is not None
    with_hash(file, "alice", QUICK.hash("right"))
    monkeypatch.setattr(keyring, "MAX_CHECKS", 0)
    both = [Credential(b"of the proxy", "proxy"), Credential(key.encode())]
    assert (await ring(file).identify(both)).name == "bob"


async def test_a_key_comes_and_goes_with_the_file(file: Path) -> None:
    alice = entries.add(file, "alice")
    assert alice is not None
    keys = ring(file)
    bob = entries.add(file, "bob")
    assert bob is not None
    assert await whose(keys, bob) == "bob"
    entries.remove(file, "alice")
    assert await whose(keys, alice) is None
    assert await keys.caller("alice") is None
    entries.remove(file, "bob")
    assert await whose(keys, bob) is None
    assert keys.required  # nobody is left, which opens nothing


async def test_a_password_that_was_remembered_goes_with_its_entry(file: Path) -> None:
    with_hash(file, "alice", QUICK.hash("right"))
    keys = ring(file)
    assert await whose(keys, "right") == "alice"
    entries.remove(file, "alice")
    assert await whose(keys, "right") is None


@pytest.mark.parametrize("damage", ["- [", "- {name: a}", "gone"])
async def test_a_broken_change_keeps_the_keys_of_before_and_is_told_once(
    file: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    alice = entries.add(file, "alice")
    assert alice is not None
    keys = ring(file)
    file.unlink() if damage == "gone" else file.write_text(damage)
    for _ in range(3):
        assert await whose(keys, alice) == "alice"
    assert caplog.text.count("stay valid") == 1
    assert alice not in caplog.text
    file.unlink(missing_ok=True)
    bob = entries.add(file, "bob")
    assert bob is not None
    assert await whose(keys, bob) == "bob"
    assert await whose(keys, alice) is None


async def test_a_file_that_is_being_written_changes_nothing_yet(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "SETTLE_SECONDS", 60.0)
    alice = entries.add(file, "alice")
    assert alice is not None
    keys = ring(file)
    file.write_text("")  # as an editor begins
    assert await whose(keys, alice) == "alice"
    os.utime(file, (0, 0))  # it stays so for long
    assert await whose(keys, alice) is None


async def test_the_file_is_looked_at_once_a_second_at_most(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "CHECK_SECONDS", 3600.0)
    entries.add(file, "alice")
    keys = ring(file)
    looks: list[object] = []
    monkeypatch.setattr(keyring, "_version", looks.append)
    for _ in range(100):
        await whose(keys, "wrong")
    assert looks == []


def test_a_server_does_not_start_without_its_file(file: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        ring(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_is_one_line(file: Path) -> None:
    entries.add(file, "alice")
    file.chmod(0)
    with pytest.raises(SettingsError, match="cannot be read"):
        ring(file)
