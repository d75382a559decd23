"""Finished images for clients that want URLs: in memory, for a while, under names none can guess.

Whoever knows a name may fetch the file, so that browsers and chat programs can, which have no key.
All files together have a limit. When it is reached, the owner with the most bytes loses his oldest
file, so that nobody's pictures make room for another's flood.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sdbento.errors import TooLarge
from sdbento.images.codec import SUFFIXES

PUBLIC_PREFIX = "/v1/images/files/"  # of paths that need no key
NAME_BYTES = 32  # of randomness


@dataclass(frozen=True)
class File:
    data: bytes
    output_format: str
    owner: str | None
    expires: float  # as the clock of its Files has it


class Files:
    """Keeps files for `seconds`, at most `max_bytes` of them; the newest stay in any case."""

    def __init__(
        self, seconds: float, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._clock = clock
        self._files: dict[str, File] = {}  # by name, the oldest first

    def add(self, images: Sequence[bytes], output_format: str, owner: str | None) -> list[str]:
        """The names of the files that hold `images`, made for `owner`.

        Raises TooLarge for more than all files may have.
        """
        self._forget_expired()
        expires = self._clock() + self._seconds
        new = {
            secrets.token_urlsafe(NAME_BYTES) + SUFFIXES[output_format]: File(
                data, output_format, owner, expires
            )
            for data in images
        }
        self._make_room(sum(map(len, images)), owner)
        self._files |= new
        return list(new)

    def get(self, name: str) -> File | None:
        self._forget_expired()
        return self._files.get(name)

    def seconds_left(self, file: File) -> int:
        return max(0, int(file.expires - self._clock()))

    def _forget_expired(self) -> None:
        now = self._clock()
        self._files = {name: file for name, file in self._files.items() if file.expires > now}

    def _make_room(self, num_bytes: int, owner: str | None) -> None:
        """For so many bytes of `owner`, at the cost of whoever then has most."""
        if num_bytes > self._max_bytes:
            raise TooLarge(
                f"the images have {num_bytes} bytes; URLs are given for {self._max_bytes} at most "
                "(SDBENTO_URL_BYTES). Ask for fewer images, or for b64_json",
                param="response_format",
            )
        held = Counter({owner: num_bytes})
        for file in self._files.values():
            held[file.owner] += len(file.data)
        while held.total() > self._max_bytes:
            owners = {file.owner for file in self._files.values()}
            richest = max(owners, key=held.__getitem__)
            oldest = next(name for name, file in self._files.items() if file.owner == richest)
            held[richest] -= len(self._files.pop(oldest).data)
