"""Servers that share a database: who runs a job, and who may say how it ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from sdbento.errors import Overloaded, Unavailable
from sdbento.jobs.fleet import servers
from sdbento.jobs.results import Results
from sdbento.jobs.store.database import ROOM_LOCK, VERSION_LOCK, wait_for_lock
from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.store.room import Limits
from tests.jobs.fleet.conftest import OpenStore
from tests.support.jobs import add_and_claim, current, new
from tests.support.server import ROOT

Lapse = Callable[[JobStore], None]


@pytest.fixture
def lapse(monkeypatch: pytest.MonkeyPatch, database: str) -> Lapse:
    """End the lease of a store's server, as if it had been frozen for long."""
    monkeypatch.setattr(servers, "SETTLE", 0.0)  # the tests' PostgreSQL has only just started

    def lapse(store: JobStore) -> None:
        with psycopg.connect(database) as connection:
            connection.execute(
                "UPDATE servers SET until = 1 WHERE id = %s", [store._database.servers.own]
            )

    return lapse


def test_servers_that_claim_at_once_never_get_the_same_job(open_store: OpenStore) -> None:
    stores = [open_store() for _ in range(4)]
    ids = {f"job-{i}" for i in range(120)}
    for job_id in ids:
        stores[0].add(new(job_id, key_name=f"key-{hash(job_id) % 3}"))

    def work(i: int) -> list[str]:
        claimed, store = [], stores[i % 4]
        while jobs := store.claim(3):
            claimed += [job.id for job in jobs]
            assert all(store.complete(job, b"[]") for job in jobs)
        return claimed

    with ThreadPoolExecutor(8) as pool:
        claimed = [job_id for some in pool.map(work, range(8)) for job_id in some]
    assert sorted(claimed) == sorted(ids)
    done = [stores[1].counts(f"key-{i}").by_status["COMPLETED"] for i in range(3)]
    assert sum(done) == len(ids)


def test_a_claim_passes_by_the_jobs_that_another_is_claiming(
    open_store: OpenStore, database: str
) -> None:
    store = open_store()
    for job_id in "abc":
        store.add(new(job_id))
    with psycopg.connect(database) as other:
        other.execute("SELECT 1 FROM jobs WHERE id = 'a' FOR UPDATE")
        assert [job.id for job in store.claim(2)] == ["b", "c"]
    assert [job.id for job in store.claim(2)] == ["a"]


def test_a_servers_own_jobs_take_its_places_and_those_of_others_do_not(
    open_store: OpenStore,
) -> None:
    one, other = open_store(), open_store()
    for i in range(20):
        one.add(new(f"a{i}", key_name="a"))
    assert len(one.claim(8, shared=True)) == 4  # half of its places
    assert len(other.claim(8, shared=True)) == 4
    assert one.claim(4, shared=True) == []


def test_limits_hold_for_all_servers_together(open_store: OpenStore) -> None:
    stores = [open_store(limits=Limits(max_unfinished=10)) for _ in range(4)]

    def fill(i: int) -> int:
        for accepted in range(10):
            try:
                stores[i].add(new(f"{i}-{accepted}"))
            except Overloaded:
                return accepted
        return 10

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(fill, range(4))) == 10


def test_the_jobs_of_a_server_that_has_stopped_are_run_by_another(open_store: OpenStore) -> None:
    one, other = open_store(), open_store()
    add_and_claim(one)
    assert other.beat() == [] and other.claim(1) == []
    one.close()
    assert other.beat() == ["a"]
    (job,) = other.claim(1)
    assert (job.id, job.run) == ("a", 2)


def test_a_lease_that_is_not_renewed_ends(open_store: OpenStore, lapse: Lapse) -> None:
    one, other = open_store(), open_store()
    add_and_claim(one)
    one.beat()
    assert other.beat() == []
    lapse(one)
    assert other.beat() == ["a"]


def test_a_server_that_wakes_up_after_its_lease_has_lost_its_runs(
    open_store: OpenStore, lapse: Lapse, tmp_path: Path
) -> None:
    one, other = open_store(), open_store()
    old = add_and_claim(one)
    assert one.over({"a": old.run}) == []
    lapse(one)
    other.beat()
    (fresh,) = other.claim(1)
    one.beat()
    assert one.over({"a": old.run}) == ["a"]
    assert not one.complete(old, b'["old"]')
    assert not one.fail(old, "late") and not one.release(old)
    assert current(one).status == "IN_PROGRESS"
    assert other.complete(fresh, b'["fresh"]')
    assert not one.complete(old, b'["old"]')
    assert other.result(current(other)) == b'["fresh"]'
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["a.2.json"]


def test_a_job_that_comes_back_to_a_server_is_another_run(
    open_store: OpenStore, lapse: Lapse
) -> None:
    one, other = open_store(), open_store()
    old = add_and_claim(one)
    lapse(one)
    other.beat()
    (fresh,) = one.claim(1)
    assert one.over({"a": old.run}) == ["a"] and one.over({"a": fresh.run}) == []
    assert not one.complete(old, b'["old"]')
    assert one.complete(fresh, b'["fresh"]')


def test_a_claim_renews_a_lease_that_is_over(open_store: OpenStore, lapse: Lapse) -> None:
    one, other = open_store(), open_store()
    lapse(one)
    job = add_and_claim(one)
    assert other.beat() == []
    assert one.complete(job, b"[]")


def test_two_threads_of_a_server_may_take_a_new_lease_at_once(
    open_store: OpenStore, database: str
) -> None:
    store = open_store()
    with store._database.engine.begin() as connection:
        store._database.servers.end(connection)
    with ThreadPoolExecutor() as pool:
        with store._database.engine.begin() as connection:
            store._database.servers.renew(connection)
            beat = pool.submit(store.beat)
            wait_until_blocked(database)
        assert beat.result() == []


def wait_until_blocked(database: str) -> None:
    """Until a transaction waits for another."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = %s"
    with psycopg.connect(database, autocommit=True) as connection:
        while not connection.execute(waiting, [connection.info.dbname]).fetchall():
            time.sleep(0.01)


def test_nobody_is_taken_for_dead_just_after_the_database_has_started(
    open_store: OpenStore, lapse: Lapse, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = open_store(), open_store()
    add_and_claim(one)
    lapse(one)
    with monkeypatch.context() as patched:
        patched.setattr(servers, "SETTLE", 86_400.0)  # the tests' PostgreSQL is younger than that
        assert other.beat() == []
    assert other.beat() == ["a"]


def test_nobody_is_taken_for_dead_by_a_server_that_was_cut_off_itself(
    open_store: OpenStore, lapse: Lapse, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = open_store(), open_store()
    add_and_claim(one)
    lapse(one)
    # The last one that the database has answered.
    other._database.servers._last_beat -= servers.LEASE
    with monkeypatch.context() as patched:
        patched.setattr(servers, "SETTLE", 86_400.0)
        other.beat()
    assert other.beat() == []
    other._database.servers._may_bury_after -= 86_400.0
    assert other.beat() == ["a"]


CLAIM_AND_DIE = """
import os, sys
from pathlib import Path
from sdbento.jobs.results import Results
from sdbento.jobs.store.job_store import JobStore
folder = Path(sys.argv[1])
store = JobStore(folder / "killed", sys.argv[2], results=Results(folder / "results"))
assert store.claim(1)
os.kill(os.getpid(), 9)
"""


def test_a_server_that_is_started_again_in_its_folder_takes_its_jobs_back_at_once(
    open_store: OpenStore, database: str, tmp_path: Path
) -> None:
    other = open_store()
    other.add(new())
    command = [sys.executable, "-c", CLAIM_AND_DIE, str(tmp_path), database]
    assert subprocess.run(command, cwd=ROOT).returncode == -9
    assert other.beat() == []
    again = JobStore(tmp_path / "killed", database, results=Results(tmp_path / "results"))
    assert again.recover() == 1
    again.close()


def test_a_start_leaves_the_jobs_of_other_servers_alone(open_store: OpenStore) -> None:
    one = open_store()
    job = add_and_claim(one)
    one._results.write("a", 1, b'["half of its end"]')
    other = open_store()
    assert other.recover() == 0
    assert one.complete(job, b'["whole"]')
    assert one.result(current(one)) == b'["whole"]'


def test_servers_may_make_the_tables_at_once(tmp_path: Path, database: str) -> None:
    def opened(i: int) -> JobStore:
        return JobStore(tmp_path / str(i), database, results=Results(tmp_path / "results"))

    with ThreadPoolExecutor(8) as pool:
        stores = [*pool.map(opened, range(8))]
    assert len({store._database.servers.own for store in stores}) == 8
    for store in stores:
        store.close()


def test_an_older_server_is_not_joined(tmp_path: Path, database: str) -> None:
    """It took the database for its own, and would put the jobs of all others into the queue."""
    with psycopg.connect(database) as old:
        old.execute("SELECT pg_advisory_lock(%s)", [VERSION_LOCK])
        with pytest.raises(Unavailable, match="earlier version"):
            JobStore(tmp_path, database)
    JobStore(tmp_path, database).close()


def test_a_frozen_transaction_does_not_hold_up_the_others(open_store: OpenStore) -> None:
    frozen, other = open_store(), open_store()
    with frozen._database.engine.connect() as connection:
        limit = "idle_in_transaction_session_timeout"
        assert connection.exec_driver_sql(f"SHOW {limit}").scalar() == "10s"
        connection.exec_driver_sql(f"SET {limit} = 500")
        wait_for_lock(connection, ROOM_LOCK)
        other.add(new())  # waits for that lock until PostgreSQL ends the transaction
        connection.invalidate()
    assert current(other).status == "IN_QUEUE"


def test_a_database_that_vanishes_is_noticed_by_who_only_listens(open_store: OpenStore) -> None:
    address = open_store().listener(lambda *_: None)._address
    with psycopg.connect(**address) as connection:
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 10


def test_many_servers_leave_no_trace_when_they_stop(open_store: OpenStore, database: str) -> None:
    for _ in range(3):
        open_store().close()
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT count(*) FROM servers").fetchone() == (0,)


def test_owners_take_turns_on_every_server(open_store: OpenStore) -> None:
    one, other = open_store(), open_store()
    for i in range(8):
        one.add(new(f"a{i}", key_name="a"))
    for i in range(4):
        one.add(new(f"b{i}", key_name="b"))
    for store in (one, other):
        assert Counter(job.owner for job in store.claim(4)) == {"a": 2, "b": 2}


HOOK = {"webhook": "https://listener.example/", "webhook_host": "listener.example"}


def due(store: JobStore, each: int = 9) -> list[str]:
    return [job.id for job in store.webhooks.due(9, each)]


def test_one_server_posts_a_webhook(open_store: OpenStore, lapse: Lapse) -> None:
    one, other = open_store(), open_store()
    one.complete(add_and_claim(one, **HOOK), b"[]")
    (job,) = one.webhooks.due(9, 9)
    assert due(other) == []
    lapse(one)
    other.beat()
    assert due(other) == ["a"]
    assert due(one) == []
    one.beat()
    one.webhooks.note(job, again_in=None)  # it was posted, before the server was frozen
    assert due(other) == []


def test_posts_of_all_servers_count_for_a_host(open_store: OpenStore) -> None:
    one, other = open_store(), open_store()
    for job_id in "abcde":
        one.add(new(job_id, error="bad", **HOOK))
    assert due(one, each=3) == ["a", "b", "c"]
    assert due(other, each=3) == []
    assert due(other, each=5) == ["d", "e"]


def test_webhooks_taken_at_once_are_posted_once(open_store: OpenStore) -> None:
    stores = [open_store() for _ in range(4)]
    for i in range(60):
        stores[0].add(new(str(i), error="bad", **HOOK))

    def post(i: int) -> list[str]:
        posted = []
        while jobs := stores[i].webhooks.due(4, each=60):
            posted += [job.id for job in jobs]
            for job in jobs:
                stores[i].webhooks.note(job, again_in=None)
        return posted

    with ThreadPoolExecutor(4) as pool:
        posted = [job_id for some in pool.map(post, range(4)) for job_id in some]
    assert len(posted) == len(set(posted))
    while left := due(stores[0], each=60):  # each server may have stopped before the last were free
        posted += left
    assert sorted(posted, key=int) == [str(i) for i in range(60)]
