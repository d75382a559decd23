"""One server per folder and database, also when a lock is lost meanwhile."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from sdbento.errors import Unavailable
from sdbento.jobs import locks
from sdbento.jobs.store import JobStore
from tests.support.jobs import add_and_claim, current, new
from tests.support.postgres import new_database
from tests.support.server import ROOT


def test_only_one_server_can_use_a_folder(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.0)
    with pytest.raises(Unavailable, match="SDBENTO_STATE_DIR"):
        JobStore(tmp_path)


def test_only_one_server_can_use_a_postgresql_database(
    tmp_path: Path, postgres_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_database(postgres_server)
    store = JobStore(tmp_path / "a", url)
    with monkeypatch.context() as patched:
        patched.setattr(locks, "LOCK_SECONDS", 0.0)
        for _ in range(2):
            with pytest.raises(Unavailable, match="JOB_STORE_URL"):
                JobStore(tmp_path / "b", url)
    add_and_claim(store)
    store.close()
    store = JobStore(tmp_path / "b", url)
    assert store.recover() == 1
    store.close()


def test_only_one_server_can_use_a_sqlite_database_of_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.0)
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    store = JobStore(tmp_path / "a", url)
    with pytest.raises(Unavailable, match="JOB_STORE_URL"):
        JobStore(tmp_path / "b", url)
    store.close()
    JobStore(tmp_path / "b", url).close()


def break_lock(url: str) -> None:
    """End the connection that holds a database, as a restart of the database does."""
    holders = (
        "FROM pg_locks JOIN pg_database ON oid = database "
        "WHERE locktype = 'advisory' AND datname = current_database()"
    )
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"SELECT pg_terminate_backend(pid) {holders}".encode())
        while connection.execute(f"SELECT pid {holders}".encode()).fetchall():
            time.sleep(0.01)


def test_the_lock_on_a_postgresql_database_is_taken_again_after_its_restart(
    tmp_path: Path, postgres_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.0)
    url = new_database(postgres_server)
    store = JobStore(tmp_path / "a", url)
    for job_id in ("a", "b"):
        break_lock(url)
        store.add(new(job_id))
        with pytest.raises(Unavailable, match="JOB_STORE_URL"):
            JobStore(tmp_path / "b", url)
    break_lock(url)
    other = JobStore(tmp_path / "b", url)
    for _ in range(2):
        with pytest.raises(Unavailable, match="JOB_STORE_URL"):
            store.claim(1)
        with pytest.raises(Unavailable, match="JOB_STORE_URL"):
            store.get("a")
    other.close()
    monkeypatch.undo()
    give_up = time.monotonic() + 5
    while not succeeds(store.expire):
        assert time.monotonic() < give_up, "the database is not free again"
        time.sleep(0.05)
    assert [job.id for job in store.claim(5)] == ["a", "b"]
    assert current(store, "a").status == "IN_PROGRESS"
    store.close()


def succeeds(action: Callable[[], object]) -> bool:
    try:
        action()
    except Unavailable:
        return False
    return True


def test_a_removed_folder_is_reported(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "state")
    (tmp_path / "state").rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(Unavailable, match="removed or replaced"):
            store.add(new())
    (tmp_path / "elsewhere").rename(tmp_path / "state")
    store.add(new())
    store.close()


def test_a_replaced_lock_file_is_reported_and_locks_nobody_out(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    (tmp_path / "lock").unlink()
    other = JobStore(tmp_path)
    with pytest.raises(Unavailable, match="removed or replaced"):
        store.add(new())
    other.add(new())
    store.close()
    other.close()


HOLD = """
import sys, time
from pathlib import Path
from sdbento.jobs.store import JobStore
store = JobStore(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_server_that_is_killed_leaves_its_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with monkeypatch.context() as patched:
            patched.setattr(locks, "LOCK_SECONDS", 0.0)
            with pytest.raises(Unavailable, match="SDBENTO_STATE_DIR"):
                JobStore(tmp_path)
        other.kill()
        JobStore(tmp_path).close()
