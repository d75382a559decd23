"""The jobs' database: how it is reached, and that it has one server. Knows nothing of jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError

from sdbento.jobs.results import FileLock, take

PRAGMAS = (
    "auto_vacuum = INCREMENTAL",  # first: it must come before the tables
    "journal_mode = WAL",
    "synchronous = FULL",  # a commit survives a power failure
    "busy_timeout = 10000",
    "journal_size_limit = 67108864",
)
# A host that is gone without a word is an error soon, not after minutes: seconds, milliseconds.
PATIENCE = {"connect_timeout": "5", "tcp_user_timeout": "10000"}
LOCK = 5_318_008_531  # any number, the same in every server


def connect(url: str | None, folder: Path) -> Engine:
    """An engine for `url`, as SQLAlchemy names it; None: SQLite in the folder."""
    engine = create_engine(_address(url, folder), pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_pragmas)
    return engine


class DatabaseLock:
    """A PostgreSQL database that this server has alone, until it is closed."""

    def __init__(self, engine: Engine) -> None:
        """Raises Unavailable when another server has it."""
        self._engine = engine
        self._connection: Connection | None = self._connect()

    def check(self) -> None:
        """Have it again when its connection was lost, as when the database was restarted.

        Raises Unavailable when another server was faster, DBAPIError when the database is away.
        """
        if self._connection is not None:
            try:
                self._connection.execute(select(1))
                return
            except DBAPIError:
                self._connection.invalidate()  # in the pool it might still have the lock
                self.close()
        self._connection = self._connect(patience=0.0)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self, patience: float | None = None) -> Connection:
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            # What a machine held that failed is free after 25 s, not after the two hours of Linux.
            for name, value in (("idle", 10), ("interval", 5), ("count", 3)):
                connection.execute(text(f"SET tcp_keepalives_{name} = {value}"))
            take(
                lambda: bool(connection.scalar(select(func.pg_try_advisory_lock(LOCK)))),
                "another server keeps its jobs in the database of JOB_STORE_URL; name another",
                patience,
            )
        except BaseException:
            connection.close()
            raise
        return connection


def lock_database(engine: Engine) -> DatabaseLock | FileLock | None:
    """Have a database alone; None for SQLite in memory. Raises Unavailable as the locks do."""
    if engine.dialect.name == "postgresql":
        return DatabaseLock(engine)
    if not engine.url.database:
        return None
    file = Path(engine.url.database)
    return FileLock(
        file.with_name(f"{file.name}.lock"),
        f"another server keeps its jobs in {file}; name another (JOB_STORE_URL)",
    )


def _address(url: str | None, folder: Path) -> URL:
    """What SQLAlchemy connects to: PostgreSQL by psycopg 3, the driver that is installed."""
    address = make_url(url or f"sqlite:///{folder.absolute() / 'jobs.db'}")
    if address.drivername in ("postgresql", "postgres"):
        address = address.set(drivername="postgresql+psycopg")
    if address.drivername == "postgresql+psycopg":
        address = address.set(query=PATIENCE | dict(address.query))
    return address


def _set_pragmas(connection: Any, _record: object) -> None:
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}").close()
