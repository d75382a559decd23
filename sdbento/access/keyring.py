"""Whose key it is that a request presents. Reads the file of keys again when it has changed.

Random keys are found by their hash, however many there are. A password is checked against every
argon2 hash, which is slow on purpose. So one request at a time is checked, results are remembered,
and after a wrong key there is a pause: guessing cannot take a core for itself, and those whose keys
are random do not notice. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cachetools import TTLCache

from sdbento.access.caller import Caller
from sdbento.access.credentials import Credential
from sdbento.access.entries import SINGLE, Entry, fits, hash_of, read
from sdbento.access.limits import Places
from sdbento.errors import Overloaded, Unauthorized
from sdbento.settings import Settings, SettingsError

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0  # between two looks at the file
SETTLE_SECONDS = 2.0  # a file that was written in place a moment ago may be half written
MAX_CHECKS = 8  # requests that may wait until their password is checked
PAUSE = 4.0  # after a wrong one, as a multiple of the time that its check took
MAX_PAUSE = 1.0  # seconds; on a busy machine that time is waiting, not work
REMEMBERED = 1024  # passwords, right or wrong
REMEMBER_SECONDS = 300.0


@dataclass(frozen=True)
class _Keys:
    """All keys at one time. `by_mac`: those that were drawn at random."""

    by_mac: dict[bytes, Caller]
    passwords: dict[str, tuple[str, Caller]]  # name -> argon2 hash
    by_name: dict[str, Caller]


class Keyring:
    """The keys of a server. Raises SettingsError if their file cannot be read at the start; when a
    later change breaks it, the keys that were there stay valid."""

    def __init__(self, settings: Settings) -> None:
        self._single = settings.api_key
        self._file = settings.api_keys
        # A dictionary finds its keys in a time that tells of them. This secret makes what is
        # looked up unforeseeable, so that nothing can be learned from it.
        self._secret = secrets.token_bytes(32)
        self._seen = _version(self._file)
        self._looked = time.monotonic()
        self._keys = self._gather([] if self._file is None else read(self._file))
        # Of passwords, by their mac and the user that came with them: whose it is; None: nobody's.
        self._remembered: TTLCache[tuple[bytes, str | None], str | None] = TTLCache(
            REMEMBERED, REMEMBER_SECONDS
        )
        self._checks = Places(MAX_CHECKS)
        self._checking = asyncio.Lock()
        self._seconds_of_check = MAX_PAUSE  # of the last one, with its pause

    @property
    def required(self) -> bool:
        """Whether there are keys. A file without any entry lets nobody in."""
        return self._single is not None or self._file is not None

    @property
    def names(self) -> list[str]:
        return [*self._keys.by_name]

    @property
    def shared(self) -> bool:
        """Whether several keys share the server."""
        return len(self._keys.by_name) > 1

    async def identify(
        self, credentials: Iterable[Credential], address: str | None = None
    ) -> Caller:
        """Whose key one of `credentials` is. `address`: where they come from.

        Raises Unauthorized, whatever is wrong with them; Overloaded while too many are checked.
        """
        await self._refresh()
        keys = self._keys
        macs = {one: self._mac(hashlib.sha256(one.key).digest()) for one in credentials}
        for mac in macs.values():
            if (caller := keys.by_mac.get(mac)) is not None:
                return caller
        for credential, mac in macs.items() if keys.passwords else ():
            if (caller := await self._check_passwords(credential, mac, address)) is not None:
                return caller
        raise Unauthorized(
            "a valid key is needed, as `Authorization: Bearer KEY` or as the password of Basic"
        )

    async def caller(self, name: str) -> Caller | None:
        """Whoever has the key of that name now; None if there is none any more."""
        await self._refresh()
        return self._keys.by_name.get(name)

    async def _check_passwords(
        self, credential: Credential, mac: bytes, address: str | None
    ) -> Caller | None:
        user = credential.user if credential.user in self._keys.passwords else None
        asked = mac, user  # two users may have the same password
        with suppress(KeyError):
            return self._remembered_caller(asked)
        if not self._checks.has_room(Caller(address=address)):
            raise Overloaded(
                "too many keys are being checked; try again later",
                retry_after=self._checks.total * self._seconds_of_check,
            )
        self._checks.change(address, 1)
        try:
            async with self._checking:
                with suppress(KeyError):  # by the request before this one
                    return self._remembered_caller(asked)
                started, keys = time.monotonic(), self._keys
                name = await asyncio.to_thread(_owner_of, credential, keys.passwords)
                if keys is self._keys:
                    self._remembered[asked] = name
                if name is None:
                    await asyncio.sleep(min(PAUSE * (time.monotonic() - started), MAX_PAUSE))
                self._seconds_of_check = time.monotonic() - started
                if name is None:
                    return None
                return keys.passwords[name][1]
        finally:
            self._checks.change(address, -1)

    def _remembered_caller(self, asked: tuple[bytes, str | None]) -> Caller | None:
        """Raises KeyError if that password was not checked lately."""
        name = self._remembered[asked]
        return None if name is None else self._keys.passwords[name][1]

    async def _refresh(self) -> None:
        """Read the file again if it has changed; looks at most once a second."""
        if self._file is None or time.monotonic() < self._looked + CHECK_SECONDS:
            return
        self._looked = time.monotonic()
        version = await asyncio.to_thread(_version, self._file)
        if version == self._seen or _is_unfinished(version, self._seen):
            return
        self._seen = version
        try:
            entries = await asyncio.to_thread(read, self._file)
        except SettingsError as error:
            log.error("%s; the keys of before stay valid", error)
            return
        self._keys = self._gather(entries)
        self._remembered.clear()
        log.info("%s was read again: %d keys", self._file, len(entries))

    def _gather(self, entries: list[Entry]) -> _Keys:
        shares = len(entries) + (self._single is not None) > 1
        keys = _Keys({}, {}, {})
        for entry in entries:
            caller = Caller(entry.name, entry.allowance, shares)
            keys.by_name[entry.name] = caller
            if entry.is_password:
                keys.passwords[entry.name] = entry.hash, caller
            else:
                keys.by_mac[self._mac_of_hash(entry.hash)] = caller
        if self._single is not None:
            caller = keys.by_name[SINGLE] = Caller(SINGLE, shares=shares)
            # If it is also in the file, it is that user's, with his limits.
            mac = self._mac_of_hash(hash_of(self._single.get_secret_value()))
            keys.by_mac.setdefault(mac, caller)
        return keys

    def _mac_of_hash(self, text: str) -> bytes:
        return self._mac(bytes.fromhex(text.removeprefix("sha256:")))

    def _mac(self, digest: bytes) -> bytes:
        return hmac.digest(self._secret, digest, "sha256")


def _owner_of(credential: Credential, passwords: dict[str, tuple[str, Caller]]) -> str | None:
    """Whose password it is; the user's that comes with it is tried first. A wrong one is compared
    with all, so that the time does not tell which names there are. Blocking, for long."""
    names = sorted(passwords, key=lambda name: name != credential.user)
    return next((name for name in names if fits(passwords[name][0], credential.key)), None)


class _Version(NamedTuple):
    """Changes whenever a file is written or replaced."""

    written_ns: int
    size: int
    inode: int


def _is_unfinished(now: _Version | None, before: _Version | None) -> bool:
    """Whether the file may still be written. Who writes it in place empties it first, and without
    their entry nobody's jobs would run any more. One that takes its place is whole."""
    if now is None or before is None or now.inode != before.inode:
        return False
    return 0 <= time.time_ns() - now.written_ns < SETTLE_SECONDS * 1e9


def _version(file: Path | None) -> _Version | None:
    """None if there is no such file. Blocking."""
    if file is None:
        return None
    try:
        found = file.stat()
    except OSError:
        return None
    return _Version(found.st_mtime_ns, found.st_size, found.st_ino)
