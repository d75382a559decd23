"""Locks that give one server a folder and a database for itself. They know nothing of jobs.

A lock ends with its process, also with one that is killed. As a server that is just stopping may
still hold its locks, a new one waits for them for a few seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, func, select, text
from sqlalchemy.exc import DBAPIError

from sdbento.errors import Unavailable

LOCK_SECONDS = 5.0  # for which a lock is waited for at a start
POLL_SECONDS = 0.05  # between two attempts
ADVISORY_LOCK = 5_318_008_531  # PostgreSQL's locks are numbers; any will do if all servers share it


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


class DatabaseLock:
    """An advisory lock that gives one server a PostgreSQL database, until it is closed.

    The lock belongs to a connection, which is kept open for nothing else.
    """

    def __init__(self, engine: Engine) -> None:
        """Raises Unavailable if another server has the lock."""
        self._engine = engine
        self._connection: Connection | None = self._connect(LOCK_SECONDS)

    def ensure_held(self) -> None:
        """Take the lock again if its connection was lost, as when the database was restarted.

        Raises Unavailable if another server was faster, DBAPIError if the database is away.
        """
        if self._connection is not None:
            try:
                self._connection.execute(select(1))
                return
            except DBAPIError:
                self._connection.invalidate()  # back in the pool it might still hold the lock
                self.close()
        self._connection = self._connect(timeout=0.0)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self, timeout: float) -> Connection:
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            # If this machine fails, the database notices and frees the lock after 25 seconds;
            # with Linux's defaults it would take two hours.
            for name, value in (("idle", 10), ("interval", 5), ("count", 3)):
                connection.execute(text(f"SET tcp_keepalives_{name} = {value}"))
            _wait_until(
                lambda: bool(connection.scalar(select(func.pg_try_advisory_lock(ADVISORY_LOCK)))),
                timeout,
            )
        except BaseException:
            connection.close()
            raise
        return connection


def lock_folder(folder: Path) -> LockFile:
    """Lock the folder of the store. Raises Unavailable if another server has it."""
    return LockFile(
        folder / "lock",
        f"another server keeps its jobs in {folder.absolute()}; name another folder "
        "(SDBENTO_STATE_DIR)",
    )


def lock_database(engine: Engine) -> DatabaseLock | LockFile | None:
    """Lock a database; None for SQLite in memory, which no other server can see.

    Raises Unavailable if another server has it.
    """
    if engine.dialect.name == "postgresql":
        return DatabaseLock(engine)
    if not engine.url.database:
        return None
    file = Path(engine.url.database)
    return LockFile(
        file.with_name(f"{file.name}.lock"),
        f"another server keeps its jobs in {file}; name another (JOB_STORE_URL)",
    )


def _wait_until(taken: Callable[[], bool], timeout: float) -> None:
    """Wait until the database's lock is `taken`. Raises Unavailable after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not taken():
        if time.monotonic() > deadline:
            raise Unavailable(
                "another server keeps its jobs in the database of JOB_STORE_URL; name another"
            )
        time.sleep(POLL_SECONDS)
