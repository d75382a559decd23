"""Jobs of several keys in one store and one service: what each can see, and who goes next."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from sdbento.access import entries, keyring
from sdbento.access.caller import Allowance, Caller, acting_for, current_caller
from sdbento.errors import LimitReached, NotFound, Overloaded
from sdbento.jobs import dispatcher
from sdbento.jobs.delivery.s3_config import S3Config
from sdbento.jobs.dispatcher import UPLOADS_TO_A_HOST
from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.store.room import Limits
from sdbento.jobs.table import Job
from sdbento.settings import Settings
from tests.support.hosts import Hosts, hosting
from tests.support.job_server import QUICKLY, SETTINGS, SOON, FakeApp, Server, serving, until
from tests.support.jobs import Clock, current, new

ALICE, BOB = Caller("alice", shares=True), Caller("bob", shares=True)
NOBODY = Caller()


# In the service


async def test_for_others_a_job_is_not_there(server: Server) -> None:
    with acting_for(ALICE):
        running = await server.submit("slow")
        await server.runs("slow")
    jobs = server.jobs
    asks: list[Callable[[str], Awaitable[Any]]] = [
        jobs.get,
        jobs.cancel,
        jobs.retry,
        lambda job_id: jobs.wait(job_id, 0.01),
        lambda job_id: jobs.stream(job_id, 0.01),
    ]
    for stranger in (BOB, NOBODY):
        with acting_for(stranger):
            for ask in asks:
                with pytest.raises(NotFound) as known:
                    await ask(running)
                with pytest.raises(NotFound) as unknown:
                    await ask("0" * len(running))
                assert known.value.message.replace(running, "0" * len(running)) == (
                    unknown.value.message
                )
            assert sum((await jobs.counts()).by_status.values()) == 0
            assert jobs.num_running == 0
            assert await jobs.purge() == 0
    with acting_for(ALICE):
        assert (await jobs.get(running)).status == "IN_PROGRESS"
        assert (await jobs.counts()).by_status["IN_PROGRESS"] == jobs.num_running == 1
        server.app.gate.set()
        await server.ended(running)
        assert (await jobs.stream(running, 0.01))[1][-1]["event"] == "done"


async def test_purging_takes_only_ones_own(server: Server) -> None:
    with acting_for(BOB):
        await server.submit("slow bob")
        waiting = [await server.submit("slow") for _ in range(2)]
    with acting_for(ALICE):
        await server.submit("slow alice")
        await server.runs("slow alice", "slow bob")
        own = [await server.submit("slow") for _ in range(3)]
        assert await server.jobs.purge() == len(own)
    with acting_for(BOB):
        for job_id in waiting:
            assert (await server.jobs.get(job_id)).status != "CANCELLED"


async def test_jobs_that_were_made_without_a_key_are_nobodys(server: Server) -> None:
    job_id = await server.submit()
    await server.ended(job_id)
    with acting_for(ALICE), pytest.raises(NotFound):
        await server.jobs.get(job_id)


def keys_of(folder: Path, *names: str, **limited: dict[str, Any]) -> Settings:
    """The settings of a server with keys of these names, some with limits."""
    file = folder / "keys.yaml"
    for name in names:
        entries.add(file, name)
    for name, limits in limited.items():
        entries.add(file, name, **limits)
    return SETTINGS.model_copy(update={"api_keys": file})


class AskedBy(FakeApp):
    """Notes on whose behalf each request came; `full` keys have no room."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: dict[str, Caller] = {}
        self.full: set[str | None] = set()

    async def stream(self, request: Any, seconds: float | None = None) -> Any:
        self.callers[request.prompt] = current_caller()
        if current_caller().name in self.full:
            raise LimitReached("too many images", retry_after=1.0)
        async for event in super().stream(request, seconds):
            yield event


async def test_a_job_runs_on_behalf_of_its_owner_with_the_limits_of_today(tmp_path: Path) -> None:
    store, app = JobStore(tmp_path), AskedBy()
    for name in ("alice", "bob", None):
        store.add(new(f"of {name}", input=f'{{"prompt": "of {name}"}}', key_name=name))
    store.close()
    settings = keys_of(tmp_path, "bob", alice={"images_at_once": 3})
    async with serving(tmp_path, app, settings=settings):
        await until(lambda: len(app.callers) == 3)
    assert app.callers["of alice"] == Caller("alice", Allowance(images_at_once=3), shares=True)
    assert app.callers["of bob"] == Caller("bob", shares=True)
    assert app.callers["of None"] == NOBODY


async def test_a_removed_key_is_told_why_its_job_failed(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    store.add(new(input='{"prompt": "x"}', key_name="eve"))
    store.close()
    async with serving(tmp_path, settings=keys_of(tmp_path, "alice", "bob")) as server:
        await until(lambda: current(server.store).status == "FAILED")
        assert "not valid any more" in str(current(server.store).error)


async def test_jobs_wait_while_the_file_of_keys_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(keyring, "SETTLE_SECONDS", 0.0)  # it takes longer than that
    settings, patient = keys_of(tmp_path, "alice", "bob"), replace(QUICKLY, key_gone=SOON)
    file = tmp_path / "keys.yaml"
    whole = file.read_text()
    async with serving(tmp_path, settings=settings, intervals=patient) as server:
        file.write_text("")
        with acting_for(ALICE):
            job_id = await server.submit()
            await until(lambda: current(server.store, job_id).run == 2)
            file.write_text(whole)
            assert (await server.ended(job_id)).status == "COMPLETED"


async def test_a_key_at_its_limit_waits_and_others_go_on(tmp_path: Path) -> None:
    app = AskedBy()
    app.full.add("alice")
    async with serving(tmp_path, app) as server:
        with acting_for(ALICE):
            waiting = await server.submit("of alice")
        await until(lambda: "of alice" in app.callers)
        with acting_for(BOB):
            for i in range(3):
                await server.ended(await server.submit(f"of bob {i}"))
        with acting_for(ALICE):
            assert (await server.jobs.get(waiting)).unfinished
            app.full.clear()
            assert (await server.ended(waiting)).status == "COMPLETED"


async def test_ones_jobs_end_while_another_has_many(tmp_path: Path) -> None:
    async with serving(tmp_path, settings=keys_of(tmp_path, "alice", "bob")) as server:
        with acting_for(ALICE):
            await asyncio.gather(*(server.submit(f"slow {i}") for i in range(40)))
        await until(lambda: server.app.num_running)
        with acting_for(BOB):
            ended = await server.ended(await server.submit("of bob"))
        assert ended.status == "COMPLETED"  # none of alice's can end before the gate opens


async def test_a_job_begins_however_many_long_ones_of_others_run(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        addresses = [Caller(address=f"198.51.100.{i}") for i in range(20)]
        for address in addresses:
            with acting_for(address):
                for _ in range(3):
                    await server.submit(f"slow {address.owner}")
        await server.runs(*(f"slow {address.owner}" for address in addresses))
        with acting_for(Caller(address="203.0.113.1")):
            assert (await server.ended(await server.submit())).status == "COMPLETED"


async def test_one_who_asks_all_the_time_holds_up_neither_others_nor_jobs(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, asked = server.store.result, threading.Event()

    def read_slowly(job: Job) -> bytes | None:
        assert job.key_name != "alice" or asked.wait(SOON)
        return read(job)

    with acting_for(ALICE):
        running = await server.submit("slow")
        job = await server.ended(await server.submit())
        monkeypatch.setattr(server.store, "result", read_slowly)
        asking = [asyncio.create_task(server.jobs.describe(job)) for _ in range(50)]
    with acting_for(BOB):
        own = await server.ended(await server.submit())
        assert b"COMPLETED" in await server.jobs.describe(own)
    server.app.gate.set()
    await until(lambda: current(server.store, running).status == "COMPLETED")
    asked.set()
    assert all(b"COMPLETED" in answer for answer in await asyncio.gather(*asking))


def bucket_at(hosts: Hosts, name: str) -> dict[str, str]:
    endpoint = hosts.url(name).removesuffix("/image.png")
    return {"accessId": "a", "accessSecret": "b", "bucketName": "c", "endpointUrl": endpoint}


async def test_a_slow_bucket_holds_up_neither_other_jobs_nor_other_uploads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        hosting(monkeypatch, num_addresses=40) as hosts,
        serving(tmp_path, settings=keys_of(tmp_path, "alice", "bob")) as server,
    ):
        with acting_for(ALICE):
            slow = [
                await server.submit(s3Config=bucket_at(hosts, f"slow-{i}.example"))
                for i in range(40)
            ]
        await until(lambda: hosts.connected.total() >= 3)
        with acting_for(BOB):
            for place in (None, bucket_at(hosts, "quick-1.example")):
                for _ in range(3):
                    job = await server.ended(await server.submit(s3Config=place))
                    assert job.status == "COMPLETED"
        with acting_for(ALICE):
            for job_id in slow:
                await server.jobs.cancel(job_id)
            await until(lambda: hosts.connected.total() == 0)  # without an answer
            assert (await server.ended(await server.submit())).status == "COMPLETED"
            assert server.jobs.num_running == 0


async def test_jobs_of_one_caller_go_on_while_some_upload_to_a_slow_host(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosting(monkeypatch) as hosts:
        for _ in range(UPLOADS_TO_A_HOST):
            await server.submit(s3Config=bucket_at(hosts, "slow-0.example"))
        await until(lambda: hosts.connected.total() == UPLOADS_TO_A_HOST)
        for _ in range(5):
            assert (await server.ended(await server.submit())).status == "COMPLETED"
        hosts.answer.set()
        await until(lambda: not server.jobs.num_running)


@pytest.mark.parametrize(
    ("name", "limit", "num_uploads"),
    [
        ("slow-{}.evil.example", 2**30, UPLOADS_TO_A_HOST),  # a host by any of its names
        ("slow-{}.example", 3, 3),  # results of a byte at least
    ],
)
async def test_uploads_are_limited_by_whose_host_it_is_and_by_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int, num_uploads: int
) -> None:
    monkeypatch.setattr(dispatcher, "UPLOAD_BYTES", limit)
    monkeypatch.setattr(dispatcher, "LARGEST_UPLOAD", 1)
    async with hosting(monkeypatch, num_addresses=10) as hosts, serving(tmp_path) as server:
        for i in range(num_uploads + 2):
            await server.submit(s3Config=bucket_at(hosts, name.format(i)))
        await until(lambda: hosts.connected.total() >= num_uploads)
        await server.ended(await server.submit())
        assert hosts.connected.total() == num_uploads
        hosts.answer.set()
        await until(lambda: not server.jobs.num_running)


def test_the_bucket_of_a_job_counts_for_its_host_whatever_the_port() -> None:
    given = {"accessId": "a", "accessSecret": "b", "bucketName": "c"}
    config = S3Config.model_validate({**given, "endpointUrl": "https://s3.example.com:8443/x"})
    assert config.host == "s3.example.com"


# In the store


def test_owners_take_turns(store: JobStore) -> None:
    for i in range(4):
        store.add(new(f"a{i}", key_name="a"))
    store.add(new("b0", key_name="b"))
    store.add(new("b1", key_name="b", low_priority=True))
    store.add(new("n0"))
    first = [job.id for job in store.claim(4)]
    assert first == ["a0", "b0", "n0", "a1"]
    assert [job.id for job in store.claim(4)] == ["b1", "a2", "a3"]


def test_a_low_priority_puts_a_job_behind_those_of_its_owner_only(store: JobStore) -> None:
    for i in range(20):
        store.add(new(f"a{i}", key_name="a"))
    for i in range(2):
        store.add(new(f"b{i}", key_name="b", low_priority=not i))
    assert [job.id for job in store.claim(4, shared=True)] == ["a0", "b1", "a1"]
    assert [job.id for job in store.claim(5, shared=True)] == ["b0", "a2"]


def test_one_who_has_a_share_is_passed_over_however_many_jobs_wait(store: JobStore) -> None:
    for i in range(20):
        store.add(new(f"a{i}", key_name="a"))
    assert len(store.claim(8, shared=True)) == 4
    for i in range(7):
        store.add(new(f"b{i}", key_name="b"))
    assert [job.id for job in store.claim(4, shared=True)] == ["b0", "b1"]


def test_cancelled_jobs_take_their_places_until_their_work_has_stopped(store: JobStore) -> None:
    for i in range(9):
        store.add(new(f"a{i}", key_name="a"))
    cancelled = dict.fromkeys("wxyz", "a")
    assert store.claim(4, running=cancelled, shared=True) == []
    del cancelled["w"], cancelled["x"]
    claimed = {job.id: job.owner for job in store.claim(6, running=cancelled, shared=True)}
    assert len(claimed) == 2
    store.add(new("b0", key_name="b"))
    assert [job.id for job in store.claim(1, running=claimed)] == ["b0"]
    store.add(new("b1", key_name="b"))
    assert [job.id for job in store.claim(1, running=dict.fromkeys("123", "b"))] == ["a2"]


def test_whoever_has_fewer_jobs_running_goes_first(store: JobStore) -> None:
    for i in range(6):
        store.add(new(f"a{i}", key_name="a"))
    assert len(store.claim(3)) == 3
    store.add(new("b0", key_name="b"))
    assert [job.id for job in store.claim(2)] == ["b0", "a3"]


def test_owners_that_wait_are_passed_over(store: JobStore) -> None:
    for name in ("a", "b", None):
        store.add(new(f"of {name}", key_name=name))
    assert [job.id for job in store.claim(5, except_of=["a"])] == ["of b", "of None"]


def test_where_places_are_shared_nobody_takes_the_last_one(store: JobStore) -> None:
    for i in range(20):
        store.add(new(f"a{i}", key_name="a"))
    assert len(store.claim(8, shared=True)) == 4
    assert store.claim(4, shared=True) == []
    store.add(new("b0", key_name="b"))
    assert [job.id for job in store.claim(4, shared=True)] == ["b0"]


@pytest.mark.parametrize("shared", [False, True])
def test_whoever_has_no_job_running_gets_one_up_to_so_many_owners(
    store: JobStore, shared: bool
) -> None:
    for i in range(8):
        store.add(new(f"a{i}", address="a"))
    assert len(store.claim(8)) == 8  # as many as there is room for
    for owner in "bcdefgh":
        for i in range(2):
            store.add(new(f"{owner}{i}", address=owner))
    begun = [job.id for job in store.claim(0, max_owners=6, shared=shared)]
    assert begun == ["b0", "c0", "d0", "e0", "f0"]
    assert store.claim(-5, max_owners=6, shared=shared) == []


def test_nobody_fills_the_store_alone(tmp_path: Path, clock: Clock, url: str | None) -> None:
    limits = Limits(max_unfinished=10, max_bytes=10_000)
    store = JobStore(tmp_path, url, limits=limits, clock=clock)
    try:
        for i in range(5):
            store.add(new(f"a{i}", key_name="a"), shared=True)
        with pytest.raises(LimitReached, match="share of the unfinished jobs"):
            store.add(new("a5", key_name="a"), shared=True)
        store.add(new("b0", input="x" * 6000, key_name="b"), shared=True)
        with pytest.raises(LimitReached, match="bytes"):
            store.add(new("b1", input="x" * 3000, key_name="b"), shared=True)
        for i in range(5, 9):
            store.add(new(f"a{i}", key_name="a"))  # as the only key of a server
        with pytest.raises(Overloaded):
            store.add(new("a9", key_name="a"))
    finally:
        store.close()


def test_nobodys_results_drive_out_those_of_another(
    tmp_path: Path, clock: Clock, url: str | None
) -> None:
    limits = Limits(max_finished=4, max_bytes=1000)
    store = JobStore(tmp_path, url, limits=limits, clock=clock)
    try:
        for job_id, owner, size in [
            ("b0", "b", 10), ("a0", "a", 10), ("a1", "a", 10), ("a2", "a", 10), ("a3", "a", 10),
            ("a4", "a", 10),
        ]:  # fmt: skip
            store.add(new(job_id, key_name=owner))
            (job,) = store.claim(1)
            clock.now += 1
            store.complete(job, b"x" * size)
        assert store.tidy() == ["a0", "a1"]
        store.add(new("a5", key_name="a"))
        (job,) = store.claim(1)
        clock.now += 1
        store.complete(job, b"x" * 990)
        assert store.tidy() == ["a2", "a3", "a4"]
        assert store.get("b0") is not None
    finally:
        store.close()


def test_counts_are_those_of_one_owner(store: JobStore) -> None:
    for job_id, owner in (("1", "a"), ("2", "a"), ("3", "b"), ("4", None)):
        store.add(new(job_id, key_name=owner))
    assert store.counts("a").by_status["IN_QUEUE"] == 2
    assert store.counts().by_status["IN_QUEUE"] == 1
    assert sorted(store.purge("a")) == ["1", "2"]
    assert current(store, "3").status == current(store, "4").status == "IN_QUEUE"


def test_a_database_of_an_earlier_version_gets_the_column(
    tmp_path: Path, url: str | None, clock: Clock
) -> None:
    store = JobStore(tmp_path, url, clock=clock)
    store.add(new("old", input='{"prompt": "x"}'))
    with store._database.engine.begin() as connection:
        connection.execute(text("DROP INDEX jobs_in_turn"))
        connection.execute(text("ALTER TABLE jobs DROP COLUMN owner"))
    store.close()
    store = JobStore(tmp_path, url, clock=clock)
    try:
        assert current(store, "old").owner is None
        store.add(new("new", key_name="a"))
        assert [job.id for job in store.claim(5)] == ["old", "new"]
    finally:
        store.close()
    JobStore(tmp_path, url, clock=clock).close()
    if url is None:
        with sqlite3.connect(tmp_path / "jobs.db") as database:
            [(names,)] = database.execute("SELECT group_concat(owner) FROM jobs")
        assert names == "a"
