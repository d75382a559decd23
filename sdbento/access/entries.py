"""The file of keys: what stands in it, how it is read, and how `sdbento keys` changes it.

A list in YAML (or JSON, which is YAML) with an entry for each key. It never holds a key itself,
only its hash: sha256 of keys that were drawn at random, argon2 of passwords that people choose.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from argon2 import PasswordHasher, extract_parameters
from argon2.exceptions import Argon2Error, InvalidHashError
from filelock import FileLock
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from sdbento.access.caller import Allowance
from sdbento.settings import SettingsError

SINGLE = "default"  # what the key of SDBENTO_API_KEY is called
PREFIX = "sdb_"  # of keys that are made here: scanners for leaked keys know them by it
MAX_RATE = 100_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_ARGON2_KB = 2**20  # 1 GB for one check

_hasher = PasswordHasher()


class Entry(BaseModel):
    """One key: whose it is, its hash, and its limits; a limit that is absent is the server's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    hash: str = Field(repr=False)
    requests_per_minute: int | None = Field(None, ge=1, le=MAX_RATE)
    images_at_once: PositiveInt | None = None
    models: list[str] | None = None

    @field_validator("name")
    @classmethod
    def _usable_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name) or name == SINGLE:
            raise ValueError(
                f"must be 1 to 64 letters, digits and any of . _ @ -, and not {SINGLE!r}"
            )
        return name

    @field_validator("hash")
    @classmethod
    def _known_hash(cls, text: str) -> str:
        if _SHA256.fullmatch(text):
            return text
        try:
            cheap = extract_parameters(text).memory_cost <= _MAX_ARGON2_KB
        except (InvalidHashError, ValueError):
            cheap = False
        if not cheap:
            raise ValueError("must be sha256:HEX or an argon2 hash, $argon2id$...")
        return text

    @property
    def is_password(self) -> bool:
        return self.hash.startswith("$argon2")

    @property
    def allowance(self) -> Allowance:
        models = None if self.models is None else frozenset(self.models)
        return Allowance(self.requests_per_minute, self.images_at_once, models)


_ENTRIES = TypeAdapter(list[Entry])


def read(path: Path) -> list[Entry]:
    """The entries of the file. Raises SettingsError, in which no hash is quoted."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _problem(path, "no such file; `sdbento keys add NAME` makes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _problem(path, f"cannot be read: {error.__class__.__name__}") from None
    return _parse(path, text)


def add(path: Path, name: str, password: str | None = None, **limits: Any) -> str | None:
    """Add an entry of that name; makes the file if it is missing. Returns the key, which is drawn
    at random unless there is a `password`, and is kept nowhere. Raises SettingsError."""
    key = None if password is not None else f"{PREFIX}{secrets.token_urlsafe(32)}"
    hash_ = hash_of(key) if key is not None else _hasher.hash(password or "")
    try:
        entry = Entry(name=name, hash=hash_, **limits)
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None

    def added(entries: list[Entry]) -> list[Entry]:
        if name in [other.name for other in entries]:
            raise SettingsError(f"{path} has a key {name!r} already; remove it first")
        if password is not None and any(fits(other.hash, password.encode()) for other in entries):
            raise SettingsError("another user has this password; whose would it be? Choose another")
        return [*entries, entry]

    _change(path, added)
    return key


def remove(path: Path, name: str) -> None:
    """Raises SettingsError if there is no such entry."""

    def without(entries: list[Entry]) -> list[Entry]:
        left = [entry for entry in entries if entry.name != name]
        if len(left) == len(entries):
            raise SettingsError(f"{path} has no key {name!r}")
        return left

    _change(path, without)


def hash_of(key: str) -> str:
    """The hash that the file keeps of a random key."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def fits(hash_: str, password: bytes) -> bool:
    """Whether an argon2 hash is that of `password`. Blocking, for about 50 ms of a core."""
    try:
        return _hasher.verify(hash_, password)
    except (Argon2Error, InvalidHashError):
        return False


def _parse(path: Path, text: str) -> list[Entry]:
    try:
        entries = _ENTRIES.validate_python(yaml.safe_load(text) or [])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise _problem(path, f"neither YAML nor JSON{where}") from None
    except ValidationError as error:
        raise _problem(path, _explain(error)) from None
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise _problem(path, f"several entries are called {', '.join(twice)}")
    owners: dict[str, str] = {}
    for entry in entries:  # whose key would it be?
        if (other := owners.setdefault(entry.hash, entry.name)) != entry.name:
            raise _problem(path, f"{other} and {entry.name} have the same hash")
    return entries


def _explain(error: ValidationError) -> str:
    """What is wrong with the first bad entry, without the values in it."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = " ".join(
        f"entry {part + 1}" if isinstance(part, int) else part for part in first["loc"]
    )
    return f"{place} {first['msg'].removeprefix('Value error, ')}".strip()


def _problem(path: Path, text: str) -> SettingsError:
    return SettingsError(f"SDBENTO_API_KEYS={str(path)!r}: {text}")


def _change(path: Path, change: Callable[[list[Entry]], list[Entry]]) -> None:
    """Read, change and replace the file. It is either the old one or the new one, whole, and only
    its owner can read it. Comments in it are lost."""
    path = path.resolve()  # the file itself, not a link to it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=10, mode=0o600):
            entries = change(read(path) if path.exists() else [])
            _write(path, [entry.model_dump(exclude_none=True) for entry in entries])
    except OSError as error:
        raise _problem(path, f"cannot be changed: {error.strerror or error}") from None


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with open(handle, "w", encoding="utf-8") as file:
            yaml.safe_dump(entries, file, sort_keys=False)
            file.flush()
            os.fsync(file.fileno())
        if path.exists() and os.geteuid() == 0:  # a server of another user must still read it
            owner = path.stat()
            os.chown(unfinished, owner.st_uid, owner.st_gid)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
