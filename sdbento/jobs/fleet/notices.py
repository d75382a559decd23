"""What servers tell each other at once, by LISTEN and NOTIFY of PostgreSQL.

A notice may be lost with a connection, so whoever relies on one also looks for itself now and then.
SQLite has one server, which tells nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import psycopg
from sqlalchemy import Connection, Engine, func, select

from sdbento.background import Problem
from sdbento.backoff import Backoff

log = logging.getLogger(__name__)

CHANNEL = "sdbento_jobs"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 5.0  # seconds between two attempts to listen

# queued: there may be something to claim. ended: a job, or a run of it. watched: a client waits for
# the events of a job that runs elsewhere. happened: some of these can be read. missed: any of this
# may have been, while this server did not hear.
Kind = Literal["queued", "ended", "watched", "happened", "missed"]
KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
Hear = Callable[[Kind, str], None]  # what happened, to the job of which id


def tell(connection: Connection, kind: Kind, job_id: str = "") -> None:
    """Tell all servers, this one too, once the transaction has been committed."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_notify(CHANNEL, f"{kind} {job_id}")))


class Listener:
    """`run` it as a task: `hear` is called with everything that any server tells."""

    def __init__(self, engine: Engine, hear: Hear) -> None:
        self._hear = hear
        self._address: dict[str, Any] = dict(engine.dialect.create_connect_args(engine.url)[1])
        self._problem = Problem(log)

    async def run(self) -> None:
        """Listen for ever, again after the database was away."""
        backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(
                    **self._address, autocommit=True
                ) as connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    self._problem.solved()
                    backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
                    self._hear("missed", "")
                    async for notice in connection.notifies():
                        self._understand(notice.payload)
            except (psycopg.Error, OSError) as error:
                self._problem.note(f"other servers are not heard: {type(error).__name__}")
            await asyncio.sleep(backoff.next_pause())

    def _understand(self, payload: str) -> None:
        kind, _, job_id = payload.partition(" ")
        if kind in KINDS:  # newer servers may tell more
            self._hear(KINDS[kind], job_id)
