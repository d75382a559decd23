"""Events of jobs on their way from the server that runs a job to the one that is asked for them."""

from __future__ import annotations

import json
from collections.abc import Collection

from sqlalchemy import delete, insert, select

from sdbento.jobs.fleet.notices import tell
from sdbento.jobs.progress import Message
from sdbento.jobs.store.session import JobDatabase
from sdbento.jobs.table import events, jobs


class EventsOfJobs:
    """What happens to jobs while they run, for the servers that do not run them."""

    def __init__(self, database: JobDatabase) -> None:
        self._database = database

    def ask(self, job_id: str) -> None:
        """Let the server that runs a job move its events to where `take` finds them."""
        with self._database.transaction() as connection:
            tell(connection, "watched", job_id)

    def publish(self, job_id: str, messages: Collection[Message]) -> None:
        """Keep events of a job that runs here for `take`, on whichever server."""
        own = jobs.c.server == self._database.servers.own, jobs.c.status == "IN_PROGRESS"
        here = select(jobs.c.number).where(jobs.c.id == job_id, *own)
        values = [{"job": job_id, "body": json.dumps(message)} for message in messages]
        with self._database.transaction() as connection:
            if values and connection.execute(here).first() is not None:
                connection.execute(insert(events), values)
                tell(connection, "happened", job_id)

    def take(self, job_id: str) -> list[Message]:
        """The events that were published since they were last taken."""
        with self._database.transaction() as connection:
            query = delete(events).where(events.c.job == job_id).returning(*events.c)
            rows = sorted(connection.execute(query), key=lambda row: row.number)
        return [json.loads(row.body) for row in rows]
