"""Two servers on one database, each on a fake App: any of them answers for every job."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest

from sdbento.access.caller import Caller, acting_for
from sdbento.jobs import service
from sdbento.jobs.results import Results
from sdbento.jobs.store.claims import MODEL_PATIENCE
from tests.support.job_server import SOON, Server, serving, until
from tests.support.jobs import new
from tests.support.listener import Listener
from tests.support.postgres import stopped


@pytest.fixture(autouse=True)
def _hears_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks again within a test: what it learns from others, it was told."""
    monkeypatch.setattr(service, "LOOK_AGAIN", 600.0)


@asynccontextmanager
async def two(folder: Path, database: str) -> AsyncIterator[tuple[Server, Server]]:
    results = Results(folder / "results")
    async with (
        serving(folder / "one", url=database, results=results) as one,
        serving(folder / "other", url=database, results=results) as other,
    ):
        yield one, other


async def running_on_one(one: Server, other: Server) -> str:
    """The id of a job that runs on the first server."""
    other.app.alive = False
    job_id = await one.submit("slow")
    await one.runs("slow")
    other.app.alive = True
    return job_id


async def test_who_waits_on_another_server_is_told_of_the_end(
    tmp_path: Path, database: str
) -> None:
    async with two(tmp_path, database) as (one, other):
        job_id = await running_on_one(one, other)
        waiting = asyncio.create_task(other.jobs.wait(job_id, SOON))
        one.app.gate.set()
        assert (await waiting).status == "COMPLETED"
        assert (await other.jobs.get(job_id)).run == 1


async def test_a_job_is_run_by_whoever_has_room(tmp_path: Path, database: str) -> None:
    async with two(tmp_path, database) as (one, other):
        ids = [await one.submit(f"slow {i}") for i in range(8)]
        await until(lambda: len(one.app.begun) == len(other.app.begun) == 4)
        one.app.gate.set()
        other.app.gate.set()
        for job_id in ids:
            assert (await one.ended(job_id)).status == "COMPLETED"
        begun = [request.prompt for request in one.app.begun + other.app.begun]
        assert sorted(begun) == [f"slow {i}" for i in range(8)]


async def test_another_server_cancels_a_job_and_its_work_stops(
    tmp_path: Path, database: str
) -> None:
    async with two(tmp_path, database) as (one, other):
        job_id = await running_on_one(one, other)
        assert (await other.jobs.cancel(job_id)).status == "CANCELLED"
        await until(lambda: one.app.cut_short == ["slow"])
        assert (await one.jobs.get(job_id)).status == "CANCELLED"


async def test_a_failed_job_is_retried_through_another_server(
    tmp_path: Path, database: str
) -> None:
    async with two(tmp_path, database) as (one, other):
        job_id = await running_on_one(one, other)
        one.app.failures["slow"] = [ValueError("a bug")]
        one.app.gate.set()
        other.app.gate.set()
        assert (await other.ended(job_id)).status == "FAILED"
        await other.jobs.retry(job_id)
        assert (await one.ended(job_id)).status == "COMPLETED"


async def test_purging_reaches_jobs_of_all_servers(tmp_path: Path, database: str) -> None:
    async with two(tmp_path, database) as (one, other):
        one.app.alive = other.app.alive = False
        ids = [await server.submit() for server in (one, other, one)]
        assert await other.jobs.purge() == 3
        assert [(await one.jobs.get(job_id)).status for job_id in ids] == ["CANCELLED"] * 3


async def streamed(server: Server, job_id: str) -> list[str]:
    """What the events are that a client reads from one server until the job has ended."""
    kinds: list[str] = []
    job, messages = await server.jobs.stream(job_id, SOON)
    while job.unfinished or messages:
        kinds += [str(message["event"]) for message in messages]
        job, messages = await server.jobs.stream(job_id, 0.05)
    return kinds


async def test_a_client_reads_the_events_of_a_job_from_another_server(
    tmp_path: Path, database: str
) -> None:
    async with two(tmp_path, database) as (one, other):
        job_id = await running_on_one(one, other)
        _, events = await other.jobs.stream(job_id, SOON)
        while not events:  # it was told that the job has begun, too
            _, events = await other.jobs.stream(job_id, SOON)
        assert [event["event"] for event in events] == ["queued", "step", "step"]
        one.app.gate.set()
        assert await streamed(other, job_id) == ["done"]
        assert await streamed(one, job_id) == []


async def test_all_servers_are_counted(tmp_path: Path, database: str) -> None:
    alice = Caller("alice")
    async with two(tmp_path, database) as (one, other):
        with acting_for(alice):
            await running_on_one(one, other)
        await asyncio.to_thread(other.store.beat, other.jobs._state())
        await asyncio.to_thread(one.store.beat, one.jobs._state())
        with acting_for(alice):
            for server, is_busy in ((one, [True, False]), (other, [False, True])):
                workers = await server.jobs.workers()
                assert [busy for _, busy in workers] == is_busy
                assert all(state.ready and state.alive for state, _ in workers)
        assert [busy for _, busy in await other.jobs.workers()] == [False, False]


async def test_a_server_stops_work_on_a_job_that_was_taken_over(
    tmp_path: Path, database: str
) -> None:
    async with two(tmp_path, database) as (one, other):
        job_id = await running_on_one(one, other)
        one.app.alive = False  # it does not claim the job again
        other.app.gate.set()
        with psycopg.connect(database) as connection:  # as when its lease is over
            connection.execute("UPDATE jobs SET status = 'IN_QUEUE' WHERE id = %s", [job_id])
        await until(lambda: one.app.cut_short == ["slow"])
        job = await one.ended(job_id)
        assert (job.status, job.run) == ("COMPLETED", 2)


async def test_a_webhook_is_posted_once_by_one_server(
    tmp_path: Path, database: str, listener: Listener
) -> None:
    async with two(tmp_path, database) as (one, other):
        ids = [await one.submit(webhook=listener.url) for _ in range(12)]
        await until(lambda: len(listener.heard) >= len(ids))
        for server in (one, other):
            await until(lambda server=server: not server.jobs._webhooks._posting)
        assert sorted(heard["id"] for heard in listener.heard) == sorted(ids)


async def test_servers_find_each_other_again_after_the_database_was_away(
    tmp_path: Path, database: str, postgres_server: str
) -> None:
    async with two(tmp_path, database) as (one, other):
        job_id = await running_on_one(one, other)
        waiting = asyncio.create_task(other.jobs.wait(job_id, 6 * SOON))
        with stopped(postgres_server):
            await until(waiting.done)  # as the status routes do meanwhile: an error, here
        with pytest.raises(Exception, match="connection"):
            await waiting
        await until(lambda: succeeds(other))
        waiting = asyncio.create_task(other.jobs.wait(job_id, 6 * SOON))
        one.app.gate.set()
        job = await waiting
        assert (job.status, job.run) == ("COMPLETED", 1)


def succeeds(server: Server) -> bool:
    try:
        server.store.counts()
    except Exception:
        return False
    return True


# Models


async def test_a_job_goes_to_the_server_that_has_its_model(tmp_path: Path, database: str) -> None:
    async with two(tmp_path, database) as (one, other):
        other.app.models = frozenset({"rare"})
        for server in (one, other):
            await asyncio.to_thread(server.store.beat, server.jobs._state())
        for i in range(4):
            one.store.add(new(str(i), input=json.dumps({"prompt": f"p{i}"}), model="rare"))
        await until(lambda: len(other.app.begun) == 4)
        assert one.app.begun == []


async def test_a_model_that_others_have_makes_nobody_wait_for_long(
    tmp_path: Path, database: str
) -> None:
    async with two(tmp_path, database) as (one, other):
        other.app.models = frozenset({"rare"})
        for server in (one, other):
            await asyncio.to_thread(server.store.beat, server.jobs._state())
        other.jobs._dispatcher.stop_claiming()  # it is full
        await other.jobs._dispatching
        one.store.add(new(input='{"prompt": "rare"}', model="rare"))
        one.store.add(new("b", input='{"prompt": "common"}'))
        await until(lambda: [request.prompt for request in one.app.begun] == ["common"])
        with psycopg.connect(database) as connection:  # some seconds later
            connection.execute("UPDATE jobs SET created = created - %s", [MODEL_PATIENCE])
        await until(lambda: len(one.app.begun) == 2)
