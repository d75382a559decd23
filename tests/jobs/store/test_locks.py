"""One server per folder and file of SQLite, also when a lock is lost meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdbento.errors import Unavailable
from sdbento.jobs.store import locks
from sdbento.jobs.store.job_store import JobStore
from tests.support.jobs import new
from tests.support.server import ROOT


def test_only_one_server_can_use_a_folder(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.0)
    with pytest.raises(Unavailable, match="SDBENTO_STATE_DIR"):
        JobStore(tmp_path)


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
from sdbento.jobs.store.job_store import JobStore
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
