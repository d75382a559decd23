"""One server's connection to the jobs' database: transactions that end when its locks are lost.

Lock order: the locks on folder and database, held for the life of it, then `_writing`, held for one
transaction. Everything blocks and is thread-safe. Knows nothing of jobs but their tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from sdbento.errors import Unavailable
from sdbento.jobs.fleet.clock import DatabaseClock
from sdbento.jobs.fleet.servers import Servers
from sdbento.jobs.store.database import connect, make_tables
from sdbento.jobs.store.locks import LockFile, lock_database, lock_folder
from sdbento.jobs.table import metadata, milliseconds


class JobDatabase:
    """The database at `url`, as SQLAlchemy writes it; None: SQLite in the folder. `close` it.

    folder: of this server, for the lock and what else it needs; created if it is missing.
    place: where results are kept, as `Results.place` has it. clock: in place of the database's.
    servers: this one among all that share the database.
    Raises Unavailable if another server has the folder, or the database if that is SQLite.
    """

    def __init__(
        self,
        folder: Path,
        url: str | None = None,
        *,
        place: Callable[[], str],
        clock: Callable[[], int] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.engine = connect(url, folder)
        self.is_shared = self.engine.dialect.name != "sqlite"  # other servers may use it
        self._clock = DatabaseClock()
        self._now = clock or (self._clock if self.is_shared else milliseconds)
        # SQLite has one writer at a time, for which others would poll.
        self._writing: AbstractContextManager[Any] = nullcontext() if self.is_shared else Lock()
        self._lost: str | None = None  # why this server no longer has its locks, if so
        self._locks: list[LockFile] = [lock_folder(folder)]
        try:
            self.servers = Servers(self.engine, folder, place() if self.is_shared else "")
            if url is not None and (lock := lock_database(self.engine)) is not None:
                self._locks.append(lock)
            make_tables(self.engine, metadata)
            with self.engine.begin() as connection:
                self.compare_clocks(connection)
                self.servers.begin(connection)
        except BaseException:
            self._free()
            raise

    def now(self) -> int:
        """The time, by the clock that the times of jobs are by."""
        return self._now()

    def compare_clocks(self, connection: Connection) -> None:
        """Learn the time of a database that several servers share."""
        if self.is_shared:
            self._clock.compare(connection)

    def close(self) -> None:
        """Jobs that this server still runs are at once the others'."""
        with suppress(DBAPIError), self.engine.begin() as connection:
            self.servers.end(connection)
        self._free()

    def _free(self) -> None:
        for lock in reversed(self._locks):
            lock.close()
        self.engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction that writes. Raises Unavailable if the locks were lost."""
        with self._writing:
            try:
                for lock in self._locks:
                    lock.ensure_held()
            except Unavailable as error:
                self._lost = error.message
                raise
            self._lost = None
            with self.engine.begin() as connection:
                yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A connection to read with. Raises Unavailable if the locks were lost."""
        if self._lost is not None:
            raise Unavailable(self._lost)
        with self.engine.connect() as connection:
            yield connection

    def vacuum(self, pages: int) -> None:
        """Return free pages of SQLite's file, up to so many, to the file system.

        The pragma frees one page at each step of its statement; `execute` makes a single step,
        `executescript` makes all.
        """
        if self.is_shared:
            return
        with self._writing, self.engine.connect() as connection:
            cursor = connection.connection.cursor()
            cursor.executescript(f"PRAGMA incremental_vacuum({pages})")
            cursor.close()
