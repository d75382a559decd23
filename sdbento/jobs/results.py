"""The results of jobs in a folder: one file per result, either whole or not there.

Knows nothing of the database and of what is in a result.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MARK_SECONDS = 5.0  # for which the file that names a folder may be empty
STRAY_SECONDS = 86_400.0  # for which a result of an unknown job is kept
# Whether the result of that run of that job may be needed; None: the job is not known.
IsNeeded = Callable[[str, int], bool | None]


class Results:
    """The results of all jobs, one file per run of a job.

    A job that is run again never overwrites the result of an earlier run. Several servers may use
    the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mark = folder.with_suffix(".id")
        self._place = ""  # until somebody asks
        folder.mkdir(parents=True, exist_ok=True)

    def place(self) -> str:
        """The same for all servers that use this folder, and for no other folder."""
        with suppress(FileExistsError), self._mark.open("x") as file:
            file.write(uuid.uuid4().hex)
        give_up = time.monotonic() + MARK_SECONDS
        while not (place := self._mark.read_text()):  # another server is just writing it
            if time.monotonic() > give_up:
                raise OSError(f"{self._mark} is empty; remove it")
            time.sleep(0.01)
        self._place = place
        return place

    def _ensure_same_place(self) -> None:
        """Raises ConnectionError if it is another folder now: a network folder that is not mounted
        leaves an empty one behind, in which other servers find nothing."""
        try:
            is_same = not self._place or self._mark.read_text() == self._place
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise ConnectionError(f"the folder of the results is gone: {self._mark} has changed")

    def write(self, job_id: str, run: int, result: bytes) -> None:
        self._ensure_same_place()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(job_id, run)
        unfinished = path.with_suffix(".tmp")
        try:
            with unfinished.open("wb") as file:
                file.write(result)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        folder = os.open(self._folder, os.O_RDONLY)  # the file's name must be on the disk as well
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def read(self, job_id: str, run: int) -> bytes | None:
        try:
            return self._path(job_id, run).read_bytes()
        except FileNotFoundError:
            self._ensure_same_place()
            return None

    def read_part(self, job_id: str, run: int, start: int, num_bytes: int) -> bytes:
        """Bytes from `start` on, fewer than `num_bytes` at the end. Raises FileNotFoundError."""
        try:
            with self._path(job_id, run).open("rb") as file:
                file.seek(start)
                return file.read(num_bytes)
        except FileNotFoundError:
            self._ensure_same_place()
            raise

    def delete(self, job_id: str, run: int) -> None:
        self._path(job_id, run).unlink(missing_ok=True)

    def keep_only(self, is_needed: IsNeeded) -> None:
        """Delete what a process left behind that died before the job's row named its result.

        Results of unknown jobs are deleted only when they are old: they may belong to another
        database, to which the operator will return.
        """
        for path in self._folder.iterdir():
            with suppress(OSError, ValueError):  # a file that is another's
                job_id, run, _ = path.name.rsplit(".", 2)
                if is_stray(is_needed(job_id, int(run)), path.stat().st_mtime):
                    path.unlink()

    def _path(self, job_id: str, run: int) -> Path:
        return self._folder / f"{job_id}.{run}.json"


def is_stray(needed: bool | None, modified: float) -> bool:
    """Whether a result that was written at the time `modified` can be deleted."""
    return time.time() - modified > STRAY_SECONDS if needed is None else not needed
