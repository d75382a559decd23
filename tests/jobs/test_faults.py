"""Disks without room, databases that are away or locked, folders that are read-only: with the real
errors of SQLite, PostgreSQL and the kernel. No job is lost, and clients are told."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from sdbento.errors import Unavailable, classify
from sdbento.jobs.store import database
from sdbento.jobs.store.job_store import JobStore
from tests.support.job_server import Server, serving
from tests.support.postgres import new_database, stopped


@contextmanager
def pragma(store: JobStore, setting: str, undone: str) -> Iterator[None]:
    """A setting of SQLite for all connections of the store, until the end of the block."""

    def apply(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute(f"PRAGMA {setting}").close()

    def undo(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute(f"PRAGMA {undone}").close()

    event.listen(store._database.engine, "checkout", apply)
    try:
        yield
    finally:
        event.remove(store._database.engine, "checkout", apply)
        event.listen(store._database.engine, "checkout", undo)


async def refused(server: Server) -> str:
    """What a client is told whose job does not fit any more. Those before are accepted."""
    for _ in range(1000):
        try:
            await server.submit("slow " + "x" * 1000)
        except Exception as exc:
            error = classify(exc)
            assert isinstance(error, Unavailable)
            return error.message
    raise AssertionError("every job was accepted")


FULL = "max_page_count = 1", "max_page_count = 1000000"
READ_ONLY = "query_only = 1", "query_only = 0"


@pytest.mark.parametrize(
    ("setting", "told"),
    [(FULL, "the disk is full"), (READ_ONLY, "its disk, is read-only")],
    ids=["full", "read-only"],
)
async def test_jobs_wait_while_the_database_cannot_be_written(
    setting: tuple[str, str], told: str, server: Server
) -> None:
    accepted = await server.submit("slow")
    await server.runs("slow")
    with pragma(server.store, *setting):
        assert told in await refused(server)
        server.app.gate.set()
        await asyncio.sleep(0.2)  # in which its end, too, may be refused
    assert (await server.ended(accepted)).status == "COMPLETED"
    assert (await server.ended(await server.submit())).status == "COMPLETED"
    assert (await server.jobs.counts()).by_status["FAILED"] == 0


async def test_a_result_waits_for_room_on_the_disk(
    server: Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's own error, by a device that is always full."""
    job_id = await server.submit("slow")
    await server.runs("slow")
    tried, run = [], (await server.jobs.get(job_id)).run
    unfinished = tmp_path / "results" / f"{job_id}.{run}.tmp"
    write = server.store._results.write

    def into_a_full_disk(*args: Any) -> None:
        tried.append(args)
        if len(tried) < 3:
            unfinished.symlink_to("/dev/full")
        write(*args)

    monkeypatch.setattr(server.store._results, "write", into_a_full_disk)
    server.app.gate.set()
    assert (await server.ended(job_id)).status == "COMPLETED"
    assert len(tried) == 3
    assert "a job's end cannot be kept yet: the disk is full" in caplog.text
    assert [path.suffix for path in unfinished.parent.iterdir()] == [".json"]


async def test_jobs_wait_while_another_process_locks_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly = [p for p in database.PRAGMAS if "busy" not in p] + ["busy_timeout = 50"]
    monkeypatch.setattr(database, "PRAGMAS", quickly)
    async with serving(tmp_path) as server:
        accepted = await server.submit("slow")
        await server.runs("slow")
        other = sqlite3.connect(tmp_path / database.FILE, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        server.app.gate.set()
        assert "does not answer" in await refused(server)
        server.jobs._store._database.engine.dispose()  # the next connection is a new one
        assert (await server.jobs.get(accepted)).status == "IN_PROGRESS"  # can still be read
        other.execute("ROLLBACK")
        other.close()
        assert (await server.ended(accepted)).status == "COMPLETED"


async def test_jobs_wait_while_postgresql_is_stopped(tmp_path: Path, postgres_server: str) -> None:
    async with serving(tmp_path, url=new_database(postgres_server)) as server:
        accepted = await server.submit("slow")
        await server.runs("slow")
        with stopped(postgres_server):
            server.app.gate.set()
            assert "does not answer" in await refused(server)
            await asyncio.sleep(0.2)  # in which its end is refused, too
        assert (await server.ended(accepted)).status == "COMPLETED"
        assert (await server.ended(await server.submit())).status == "COMPLETED"
        assert [request.prompt for request in server.app.begun] == ["slow", "quick"]
