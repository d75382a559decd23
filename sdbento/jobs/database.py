"""How the jobs' database is reached and its tables made: SQLite in a file, or PostgreSQL.

Knows nothing of jobs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Engine, MetaData, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url

FILE = "jobs.db"
PRAGMAS = (
    "auto_vacuum = INCREMENTAL",  # first: it has no effect once there are tables
    "journal_mode = WAL",
    "synchronous = FULL",  # a commit survives a power failure
    "secure_delete = FAST",  # what is deleted is overwritten where that costs nothing
    "busy_timeout = 10000",
    "journal_size_limit = 67108864",
)
# A host that has vanished is an error after seconds, not minutes. The first is in seconds, the
# second in milliseconds.
TIMEOUTS = {"connect_timeout": "5", "tcp_user_timeout": "10000"}


def connect(url: str | None, folder: Path) -> Engine:
    """An engine for the database at `url`, as SQLAlchemy writes it; None: SQLite in `folder`."""
    if url is None:
        (folder / FILE).touch(mode=0o600)  # it may hold credentials of clients
    # An error would otherwise show the values of its statement, in the log.
    engine = create_engine(_address(url, folder), pool_pre_ping=True, hide_parameters=True)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_pragmas)
    return engine


def make_tables(engine: Engine, metadata: MetaData) -> None:
    """Make the tables that are missing, and add the columns that an earlier version did not have.

    Rows that are there have nothing in such a column, so it must be nullable.
    """
    metadata.create_all(engine)
    for table in metadata.tables.values():
        there = {column["name"] for column in inspect(engine).get_columns(table.name)}
        for column in table.columns:
            if column.name in there:
                continue
            kind = column.type.compile(engine.dialect)
            with engine.begin() as connection:
                connection.execute(text(f"ALTER TABLE {table.name} ADD {column.name} {kind}"))


def _address(url: str | None, folder: Path) -> URL:
    """The URL for SQLAlchemy: PostgreSQL is reached by psycopg 3, the driver that is installed."""
    address = make_url(url or f"sqlite:///{folder.absolute() / FILE}")
    if address.drivername in ("postgresql", "postgres"):
        address = address.set(drivername="postgresql+psycopg")
    if address.drivername == "postgresql+psycopg":
        address = address.set(query=TIMEOUTS | dict(address.query))
    return address


def _set_pragmas(connection: Any, _record: object) -> None:
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}").close()
