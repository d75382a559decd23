"""Locks that give one server a folder and a file of SQLite for itself. They know nothing of jobs.

A lock ends with its process, also with one that is killed. As a server that is just stopping may
still hold its locks, a new one waits for them for a few seconds.
"""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout
from sqlalchemy import Engine

from sdbento.errors import Unavailable

LOCK_SECONDS = 5.0  # for which a lock is waited for at a start
POLL_SECONDS = 0.05  # between two attempts


class LockFile:
    """A locked file that gives one server everything beside it, until it is closed."""

    def __init__(self, path: Path, refusal: str) -> None:
        """Raises Unavailable, with the text `refusal`, if another server has the lock."""
        self._path = path
        self._lock = FileLock(
            path,
            timeout=LOCK_SECONDS,
            poll_interval=POLL_SECONDS,
            mode=0o600,
            thread_local=False,  # one thread opens the store, another one closes it
            fallback_to_soft=False,  # a file that only exists would outlive a killed server
        )
        try:
            self._lock.acquire()
        except Timeout:
            raise Unavailable(refusal) from None
        self._locked = os.stat(path)

    def ensure_held(self) -> None:
        """Raises Unavailable if the file was removed or replaced, likely with its whole folder.

        The lock on the old file would then keep no other server away.
        """
        try:
            same = os.path.samestat(os.stat(self._path), self._locked)
        except FileNotFoundError:
            same = False
        if not same:
            raise Unavailable(
                "the folder of the jobs was removed or replaced under the server; restart it"
            )

    def close(self) -> None:
        self._lock.release()


def lock_folder(folder: Path) -> LockFile:
    """Lock the folder of the store. Raises Unavailable if another server has it."""
    return LockFile(
        folder / "lock",
        f"another server keeps its jobs in {folder.absolute()}; name another folder "
        "(SDBENTO_STATE_DIR)",
    )


def lock_database(engine: Engine) -> LockFile | None:
    """Lock a SQLite database; None if it is in memory, which no other server can see, and for
    PostgreSQL, which servers share.

    Raises Unavailable if another server has it.
    """
    if engine.dialect.name != "sqlite" or not engine.url.database:
        return None
    file = Path(engine.url.database)
    return LockFile(
        file.with_name(f"{file.name}.lock"),
        f"another server keeps its jobs in {file}; name another (JOB_STORE_URL)",
    )
