"""The folder of the job store: a file a result, each whole or not there, and a lock.

Knows nothing of rows and of what is in a result.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sdbento.errors import Unavailable

LOCK_SECONDS = 5.0  # that a server which is just ending may still hold its locks


class Results:
    """A file a result, each whole or not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, job_id: str, run: int, output: bytes) -> None:
        path = self._path(job_id, run)
        unfinished = path.with_suffix(".tmp")
        try:
            with unfinished.open("wb") as file:
                file.write(output)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        folder = os.open(self._folder, os.O_RDONLY)  # so that the name is on the disk as well
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def read(self, job_id: str, run: int) -> bytes | None:
        try:
            return self._path(job_id, run).read_bytes()
        except FileNotFoundError:
            return None

    def delete(self, job_id: str, run: int) -> None:
        self._path(job_id, run).unlink(missing_ok=True)

    def keep_only(self, known: set[tuple[str, int]]) -> None:
        """Delete what a process left that died before its row knew of it."""
        wanted = {self._path(*pair) for pair in known}
        for path in self._folder.iterdir():
            if path not in wanted:
                with suppress(OSError):
                    path.unlink()

    def _path(self, job_id: str, run: int) -> Path:
        return self._folder / f"{job_id}.{run}.json"


def lock_folder(folder: Path) -> int:
    """Have the folder alone until the file is closed, which the end of the process does as well."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        take(
            lambda: _locked(lock),
            f"another server keeps its jobs in {folder.absolute()}; name another folder "
            "(SDBENTO_STATE_DIR)",
        )
    except BaseException:
        os.close(lock)
        raise
    return lock


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take(taken: Callable[[], bool], refusal: str) -> None:
    """Wait until a lock is `taken`. Raises Unavailable, with the `refusal`, when it never is."""
    give_up = time.monotonic() + LOCK_SECONDS
    while not taken():
        if time.monotonic() > give_up:
            raise Unavailable(refusal)
        time.sleep(0.05)
