"""The folder of the job store: a file a result, each whole or not there, and a lock.

Knows nothing of rows and of what is in a result.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from sdbento.errors import Unavailable

LOCK_SECONDS = 5.0  # that a server which is just ending may still hold its locks
STRAY_SECONDS = 86_400.0  # for which a result is kept whose job is not known


class Results:
    """A file a result, each whole or not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, job_id: str, run: int, output: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
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

    def keep_only(self, runs: Mapping[str, int | None]) -> None:
        """Delete what a process left that died before its row knew of it.

        runs: of all jobs, the one that made the job's result; None where it has none. What is of no
        job goes later: it may be of another database, to which the operator returns.
        """
        for path in self._folder.iterdir():
            job_id = path.name.rsplit(".", 2)[0]
            with suppress(OSError):
                if job_id in runs or path.suffix == ".tmp":
                    run = runs.get(job_id)
                    stray = run is None or path != self._path(job_id, run)
                else:
                    stray = time.time() - path.stat().st_mtime > STRAY_SECONDS
                if stray:
                    path.unlink()

    def _path(self, job_id: str, run: int) -> Path:
        return self._folder / f"{job_id}.{run}.json"


class FileLock:
    """Something that this server has alone, by a locked file, until it is closed or ends."""

    def __init__(self, path: Path, refusal: str) -> None:
        """Raises Unavailable, with the `refusal`, when another server has it."""
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            take(lambda: _locked(self._file), refusal)
        except BaseException:
            os.close(self._file)
            raise

    def check(self) -> None:
        """Raises Unavailable when the file was removed, and likely all that lay beside it."""
        try:
            same = os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            same = False
        if not same:
            raise Unavailable(
                "the folder of the jobs was removed or replaced under the server; restart it"
            )

    def close(self) -> None:
        os.close(self._file)


def lock_folder(folder: Path) -> FileLock:
    return FileLock(
        folder / "lock",
        f"another server keeps its jobs in {folder.absolute()}; name another folder "
        "(SDBENTO_STATE_DIR)",
    )


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take(taken: Callable[[], bool], refusal: str, patience: float | None = None) -> None:
    """Wait until a lock is `taken`. Raises Unavailable, with the `refusal`, when it never is."""
    give_up = time.monotonic() + (LOCK_SECONDS if patience is None else patience)
    while not taken():
        if time.monotonic() > give_up:
            raise Unavailable(refusal)
        time.sleep(0.05)
