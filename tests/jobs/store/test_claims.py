"""What a claim reads of the queue, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event, insert, text

from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.table import jobs
from tests.support.jobs import Clock, new

NOT_YET = dict.fromkeys(("run", "retries", "interruptions", "size", "created", "webhook_posts"), 0)


def fill(store: JobStore, num_jobs: int, num_owners: int) -> None:
    """A long queue. PostgreSQL knows its statistics, and reads whole tables only where it must: it
    would also read those that are as short as this one."""
    values: dict[str, Any] = NOT_YET | {"status": "IN_QUEUE", "expires": store.now() + 1000}
    with store._database.engine.begin() as connection:
        rows = [
            asdict(new(f"job-{i}", key_name=f"key-{i % num_owners}")) | values
            for i in range(num_jobs)
        ]
        connection.execute(insert(jobs), rows)
        if store.is_shared:
            name = connection.scalar(text("SELECT current_database()"))
            connection.execute(text(f'ALTER DATABASE "{name}" SET enable_seqscan = off'))
            connection.execute(text("ANALYZE jobs"))
    store._database.engine.dispose()  # only new connections have the setting


@contextmanager
def plans(store: JobStore) -> Iterator[list[str]]:
    """How the database executes each statement about jobs."""
    found: list[str] = []
    explain = "EXPLAIN " if store.is_shared else "EXPLAIN QUERY PLAN "

    def note(connection: Connection, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "FROM jobs" in statement and not statement.startswith("EXPLAIN"):
            rows = connection.exec_driver_sql(explain + statement, parameters)
            found.append("\n".join(str(row) for row in rows))

    event.listen(store._database.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(store._database.engine, "before_cursor_execute", note)


def reads_all(plan: str) -> bool:
    return any(words in plan for words in ("Seq Scan on jobs", "Sort", "SCAN jobs", "TEMP B-TREE"))


def test_a_claim_does_not_read_the_whole_queue(store: JobStore) -> None:
    fill(store, 3000, 7)
    with plans(store) as found:
        assert [job.id for job in store.claim(9)] == [f"job-{i}" for i in range(9)]
    assert len(found) > 9
    assert not [plan for plan in found if reads_all(plan)]


def test_reading_the_whole_queue_would_be_noticed(store: JobStore) -> None:
    fill(store, 3000, 7)
    with plans(store) as found, store._database.engine.connect() as connection:
        connection.execute(text("SELECT id FROM jobs ORDER BY size"))
    assert [reads_all(plan) for plan in found] == [True]


def test_a_database_of_an_earlier_version_gets_the_index(
    tmp_path: Path, url: str | None, clock: Clock
) -> None:
    store = JobStore(tmp_path, url, clock=clock)
    with store._database.engine.begin() as connection:
        connection.execute(text("DROP INDEX jobs_in_turn"))
    store.close()
    with closing(JobStore(tmp_path, url, clock=clock)) as store:
        fill(store, 3000, 7)
        with plans(store) as found:
            store.claim(1)
    assert found and not [plan for plan in found if reads_all(plan)]
