"""Which servers live: each holds a lease on its jobs, which it renews by heartbeats.

A server that does not renew its lease is dead to the others, which take its jobs over. It may only
be frozen, or cut off from the database. So nothing relies on its being dead: every claim of a job
has a number (`run`), and the end of a run counts only if the job still has that number and server.

Leases are compared by the database's clock alone. SQLite has one server, whose lease never ends.
Everything blocks and is thread-safe. Knows nothing of what a job computes.
"""

from __future__ import annotations

import json
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Select,
    delete,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from sdbento.errors import Unavailable
from sdbento.jobs.fleet.clock import DATABASE_NOW
from sdbento.jobs.table import servers

LEASE = 15.0  # seconds from a heartbeat after which a server's jobs may be taken over
BEAT = 3.0  # seconds between two heartbeats
SETTLE = LEASE  # seconds after the database was away in which nobody is taken for dead
FOR_EVER = 2**62
ID_FILE = "server"  # in the folder of a server: its present identity


@dataclass(frozen=True)
class State:
    """What a server tells of itself. alive: it can still make images. ready: it has loaded its
    default model. models: the names of those in its memory."""

    alive: bool = True
    ready: bool = False
    models: frozenset[str] = frozenset()


class Servers:
    """This server among all of its database. `own` is its identity.

    place: where it keeps results, as `Results.place` has it.
    """

    def __init__(self, engine: Engine, folder: Path, place: str) -> None:
        self._is_alone = engine.dialect.name == "sqlite"
        self._file = folder / ID_FILE
        self._place = place
        self._may_bury_after = 0.0  # time.monotonic()
        self._last_beat = time.monotonic()
        self._state = State()
        self.own = uuid.uuid4().hex
        self.now: ColumnElement[int] = literal(0) if self._is_alone else DATABASE_NOW
        self.living: Select[tuple[str]] = select(servers.c.id)  # as far as is known

    def begin(self, connection: Connection) -> None:
        """Start to live, under a new identity. Whoever had this folder before is dead: the folder
        has a lock.

        Raises Unavailable if others that live keep their results elsewhere.
        """
        self.end(connection)
        if self._is_alone:
            connection.execute(delete(servers))
        elif self._file.exists():
            before = self._file.read_text()
            connection.execute(delete(servers).where(servers.c.id == before))
        self._ensure_same_place(connection)
        self.own = uuid.uuid4().hex
        self._file.write_text(self.own)
        self.renew(connection)

    def _ensure_same_place(self, connection: Connection) -> None:
        elsewhere = servers.c.until > self.now, servers.c.results != self._place
        if connection.execute(select(servers.c.id).where(*elsewhere)).first() is not None:
            raise Unavailable(
                "the servers that share the database of JOB_STORE_URL keep the results of jobs in "
                "another place; name the same one on all (SDBENTO_JOB_RESULTS, "
                "SDBENTO_JOB_RESULTS_DIR)"
            )

    def renew(self, connection: Connection) -> None:
        """Renew the lease; take a new one if it was ended by others."""
        values = {
            "until": literal(FOR_EVER) if self._is_alone else self.now + round(LEASE * 1000),
            "alive": int(self._state.alive),
            "ready": int(self._state.ready),
            "results": self._place,
            "models": json.dumps(sorted(self._state.models)),
        }
        own = servers.c.id == self.own
        if not connection.execute(update(servers).where(own).values(values)).rowcount:
            # Another thread of this server may be doing the same.
            with suppress(IntegrityError), connection.begin_nested():
                connection.execute(insert(servers).values(values | {"id": self.own}))

    def ensure_lease(self, connection: Connection) -> None:
        """Renew the lease if it is over: what is claimed without one would be taken over at once,
        as after this process was frozen."""
        holds = servers.c.id == self.own, servers.c.until > self.now
        if connection.execute(select(servers.c.id).where(*holds)).first() is None:
            self.renew(connection)

    def is_only(self, connection: Connection) -> bool:
        """Whether there is no other server, as far as is known."""
        return connection.execute(self.living.where(servers.c.id != self.own)).first() is None

    def others(self, connection: Connection) -> dict[str, State]:
        """What the other servers have told of themselves lately, by their identities."""
        holds = (servers.c.until > self.now).label("holds")
        rows = connection.execute(select(servers, holds).where(servers.c.id != self.own))
        return {
            row.id: State(
                alive=bool(row.alive and row.holds),
                ready=bool(row.ready and row.holds),
                models=frozenset(json.loads(row.models)),
            )
            for row in rows
        }

    def models_elsewhere(self, connection: Connection) -> frozenset[str]:
        """The models in the memory of other servers that are ready, but not in that of this one."""
        ready = [state.models for state in self.others(connection).values() if state.ready]
        return frozenset().union(*ready) - self._state.models

    def beat(self, connection: Connection, state: State) -> None:
        """Renew the lease, as every BEAT seconds."""
        self._state = state
        self.renew(connection)
        now = time.monotonic()
        if now - self._last_beat > LEASE:
            self._may_bury_after = now + SETTLE
        self._last_beat = now

    def bury(self, connection: Connection) -> None:
        """Forget the servers whose lease is over: they are dead.

        If the database was away, for this server or for all, the others may live and need a moment
        to renew their leases.
        """
        if self._is_alone or time.monotonic() < self._may_bury_after:
            return
        settled = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, SETTLE)
        is_up = func.pg_postmaster_start_time() <= settled
        connection.execute(delete(servers).where(servers.c.until <= self.now, is_up))

    def end(self, connection: Connection) -> None:
        """End the lease: this server runs no jobs any more."""
        connection.execute(delete(servers).where(servers.c.id == self.own))
