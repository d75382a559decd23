"""The results of jobs in a folder: one file per result, either whole or not there.

Knows nothing of the database and of what is in a result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

STRAY_SECONDS = 86_400.0  # for which a result of an unknown job is kept


class Results:
    """The results of all jobs, one file per run of a job.

    A job that is run again never overwrites the result of an earlier run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, job_id: str, run: int, result: bytes) -> None:
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
            return None

    def read_part(self, job_id: str, run: int, start: int, num_bytes: int) -> bytes:
        """Bytes from `start` on, fewer than `num_bytes` at the end. Raises FileNotFoundError."""
        with self._path(job_id, run).open("rb") as file:
            file.seek(start)
            return file.read(num_bytes)

    def delete(self, job_id: str, run: int) -> None:
        self._path(job_id, run).unlink(missing_ok=True)

    def keep_only(self, runs: Mapping[str, int | None]) -> None:
        """Delete what a process left behind that died before the job's row named its result.

        runs: for every known job the number of the run that made its result, None if it has none.
        Results of unknown jobs are deleted only when they are old: they may belong to another
        database, to which the operator will return.
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
