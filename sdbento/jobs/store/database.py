"""How the jobs' database is reached and its tables made: SQLite in a file, or PostgreSQL.

Knows nothing of jobs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    MetaData,
    create_engine,
    event,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.schema import CreateIndex

from sdbento.errors import Unavailable

FILE = "jobs.db"
PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = FULL",  # a commit survives a power failure
    "secure_delete = FAST",  # what is deleted is overwritten where that costs nothing
    "busy_timeout = 10000",
    "journal_size_limit = 67108864",
)
# A host that has vanished is an error after seconds, not minutes: also for a connection on which
# nothing is sent, as where notices are waited for. In seconds; tcp_user_timeout in milliseconds.
TIMEOUTS = {
    "connect_timeout": "5",
    "tcp_user_timeout": "10000",
    "keepalives": "1",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
}
# The same on the side of PostgreSQL, which would otherwise keep the locks of a server that has
# vanished, or was frozen in the midst of a transaction. In ms, or seconds for tcp_keepalives.
SESSION = {
    "idle_in_transaction_session_timeout": 10_000,
    "lock_timeout": 12_000,
    "tcp_keepalives_idle": 10,
    "tcp_keepalives_interval": 5,
    "tcp_keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
# PostgreSQL's advisory locks are numbers; any will do if all servers share them.
VERSION_LOCK = 5_318_008_531  # held by servers of 0.1.0, which could not share a database
TABLES_LOCK, ROOM_LOCK, TIDY_LOCK = 5_318_008_532, 5_318_008_533, 5_318_008_534


def connect(url: str | None, folder: Path) -> Engine:
    """An engine for the database at `url`, as SQLAlchemy writes it; None: SQLite in `folder`."""
    if url is None:
        (folder / FILE).touch(mode=0o600)  # it may hold credentials of clients
    # An error would otherwise show the values of its statement, in the log.
    engine = create_engine(_address(url, folder), pool_pre_ping=True, hide_parameters=True)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_pragmas)
    else:
        event.listen(engine, "connect", _limit_session)
    return engine


def make_tables(engine: Engine, metadata: MetaData) -> None:
    """Make the tables that are missing, and add the columns and indexes that an earlier version did
    not have.

    Rows that are there have nothing in such a column, so it must be nullable.
    """
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            _refuse_beside_old_servers(connection)
            wait_for_lock(connection, TABLES_LOCK)  # several servers may start at once
        metadata.create_all(connection)
        for table in metadata.tables.values():
            there = {column["name"] for column in inspect(connection).get_columns(table.name)}
            for column in table.columns:
                if column.name in there:
                    continue
                kind = column.type.compile(engine.dialect)
                connection.execute(text(f"ALTER TABLE {table.name} ADD {column.name} {kind}"))
            for index in table.indexes:
                connection.execute(CreateIndex(index, if_not_exists=True))


def wait_for_lock(connection: Connection, lock: int) -> None:
    """Hold a lock of all servers until the end of the transaction. SQLite has one server."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(lock)))


def try_lock(connection: Connection, lock: int) -> bool:
    """As `wait_for_lock`, without waiting: whether it is held."""
    if connection.dialect.name != "postgresql":
        return True
    return bool(connection.scalar(select(func.pg_try_advisory_xact_lock(lock))))


def _refuse_beside_old_servers(connection: Connection) -> None:
    free = connection.scalar(select(func.pg_try_advisory_xact_lock_shared(VERSION_LOCK)))
    if not free:
        raise Unavailable(
            "a server of an earlier version keeps its jobs in the database of JOB_STORE_URL, and "
            "does not share it; stop that server first"
        )


def _address(url: str | None, folder: Path) -> URL:
    """The URL for SQLAlchemy: PostgreSQL is reached by psycopg 3, the driver that is installed."""
    address = make_url(url or f"sqlite:///{folder.absolute() / FILE}")
    if address.drivername in ("postgresql", "postgres"):
        address = address.set(drivername="postgresql+psycopg")
    if address.drivername == "postgresql+psycopg":
        address = address.set(query=TIMEOUTS | dict(address.query))
    return address


def _set_pragmas(connection: Any, _record: object) -> None:
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    if not pages:
        # Without effect once there are tables; it would then wait for whoever writes, even where
        # the connection is only read with.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL").close()
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}").close()


def _limit_session(connection: Any, _record: object) -> None:
    for name, value in SESSION.items():
        connection.execute(f"SET {name} = {value}")
    connection.commit()
