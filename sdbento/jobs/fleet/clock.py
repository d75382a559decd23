"""The time by the clock of a PostgreSQL database, without asking it each time.

The clocks of servers differ, and jobs that one of them has stored are read by all.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Connection, cast, func, select

from sdbento.jobs.table import milliseconds

MOST_WAIT = 1000  # ms for an answer, beyond which it says too little of the time
DATABASE_NOW = cast(func.extract("epoch", func.clock_timestamp()) * 1000, BigInteger)


class DatabaseClock:
    """Milliseconds since the epoch: this machine's own clock, and how far it was behind the
    database's when it was compared last."""

    def __init__(self) -> None:
        self._behind = 0

    def __call__(self) -> int:
        return milliseconds() + self._behind

    def compare(self, connection: Connection) -> None:
        before = milliseconds()
        there: int = connection.execute(select(DATABASE_NOW)).scalar_one()
        after = milliseconds()
        if after - before <= MOST_WAIT:
            self._behind = there - (before + after) // 2
