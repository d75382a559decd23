"""The store alone, on files in a temporary folder, with a clock that the tests set."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from sdbento.errors import NotFound, Overloaded
from sdbento.jobs import results as job_results
from sdbento.jobs.store.claims import SUSPECT_INTERRUPTIONS
from sdbento.jobs.store.ends import MAX_INTERRUPTIONS
from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.store.room import ENOUGH_POSTS, Limits
from tests.support.jobs import HOUR, Clock, add_and_claim, current, kept_to_run, new
from tests.support.server import ROOT

# A job's way


def test_a_job_waits_runs_and_completes(store: JobStore, clock: Clock) -> None:
    store.add(new(input='{"prompt": "x"}'))
    waiting = current(store)
    assert (waiting.status, waiting.delay, waiting.execution) == ("IN_QUEUE", None, None)
    clock.now += 70
    (job,) = store.claim(5)
    assert replace(job, input=None) == current(store)
    assert (job.status, job.delay, job.execution) == ("IN_PROGRESS", 70, None)
    assert job.input == '{"prompt": "x"}'
    clock.now += 130
    assert store.complete(job, b'["picture"]')
    done = current(store)
    assert (done.status, done.delay, done.execution) == ("COMPLETED", 70, 130)
    assert kept_to_run(store) == (None, None)
    assert store.result(done) == b'["picture"]'


def test_operations_on_missing_jobs_return_nothing(store: JobStore) -> None:
    assert store.get("a") is None
    assert store.cancel("a") is None
    assert not store.retry("a")
    assert not any([store.claim(5), store.purge(), store.expire(), store.tidy()])


def test_the_oldest_jobs_start_first_and_low_priority_last(store: JobStore) -> None:
    for job_id in "abcdef":
        store.add(new(job_id, low_priority=job_id in "ad"))
    order = [job.id for _ in range(4) for job in store.claim(2)]
    assert order == ["b", "c", "e", "f", "a", "d"]


def test_a_released_job_returns_to_its_place_in_the_queue(store: JobStore) -> None:
    for job_id in "abc":
        store.add(new(job_id))
    first, _ = store.claim(2)
    assert store.release(first)
    (again,) = store.claim(1)
    assert (again.id, again.run) == ("a", 2)


# Ends


def test_a_job_ends_once(store: JobStore) -> None:
    job = add_and_claim(store)
    cancelled = store.cancel("a")
    assert cancelled is not None and cancelled.status == "CANCELLED"
    assert not store.complete(job, b"[]")
    assert not store.fail(job, "too late")
    assert not store.release(job)
    assert current(store).status == "CANCELLED"
    assert store.result(current(store)) is None


def test_an_end_can_be_recorded_again_when_the_answer_was_lost(store: JobStore) -> None:
    job = add_and_claim(store)
    for _ in range(2):  # a commit may be done though the connection broke before its answer
        assert store.complete(job, b'["picture"]')
    assert store.result(current(store)) == b'["picture"]'
    job = add_and_claim(store, "b")
    assert store.release(job) and store.release(job)


def test_the_result_of_a_cancelled_job_is_not_kept(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = add_and_claim(store)
    with monkeypatch.context() as patched:
        patched.setattr(store, "_end_run", lambda *_: 1 / 0)  # the database is away for now
        with pytest.raises(ZeroDivisionError):
            store.complete(job, b"[]")
    store.cancel("a")
    assert list((tmp_path / "results").iterdir()) == []


def test_cancelling_a_finished_job_changes_nothing(store: JobStore) -> None:
    store.complete(add_and_claim(store), b"[]")
    before = current(store)
    assert store.cancel("a") == before


def test_an_abandoned_run_cannot_end_the_next_one(store: JobStore) -> None:
    old = add_and_claim(store)
    store.fail(old, "late", "TIMED_OUT")
    assert store.retry("a")
    (fresh,) = store.claim(1)
    assert not store.complete(old, b'["old"]')
    assert store.complete(fresh, b'["fresh"]')
    assert store.result(current(store)) == b'["fresh"]'


def test_a_failed_job_can_be_retried_with_its_input(store: JobStore, clock: Clock) -> None:
    store.fail(add_and_claim(store, input='{"prompt": "x"}'), "out of luck")
    assert current(store).error == "out of luck"
    clock.now += 50
    assert store.retry("a")
    waiting = current(store)
    assert (waiting.status, waiting.error, waiting.finished) == ("IN_QUEUE", None, None)
    clock.now += 5
    (job,) = store.claim(1)
    assert (job.input, job.delay) == ('{"prompt": "x"}', 5)
    assert store.counts().retries == 1


def test_only_failed_or_timed_out_jobs_can_be_retried(store: JobStore) -> None:
    store.add(new("queued"))
    assert not store.retry("queued")
    (job,) = store.claim(1)
    assert not store.retry("queued")
    store.complete(job, b"[]")
    assert not store.retry("queued")


def test_a_job_whose_ttl_passes_in_the_queue_times_out(store: JobStore, clock: Clock) -> None:
    store.add(new("short", ttl=10_000))
    store.add(new("long", ttl=20_000))
    clock.now += 10_000
    assert [job.id for job in store.claim(5)] == ["long"]
    assert store.expire() == ["short"]
    job = current(store, "short")
    assert (job.status, job.delay, job.execution) == ("TIMED_OUT", 10_000, 0)
    assert job.error is not None and "ttl" in job.error
    clock.now += 20_000
    assert store.expire() == []  # running jobs have a limit of their own


def test_purging_cancels_waiting_jobs_only(store: JobStore) -> None:
    add_and_claim(store, "running")
    store.add(new("b"))
    store.add(new("c"))
    assert sorted(store.purge()) == ["b", "c"]
    assert current(store, "running").status == "IN_PROGRESS"
    assert store.counts().by_status["CANCELLED"] == 2


def test_a_job_can_be_added_as_already_failed(store: JobStore) -> None:
    store.add(new(error="prompt is required"))
    job = current(store)
    assert kept_to_run(store) == (None, None) and not store.retry("a")  # it would fail again
    assert (job.status, job.error, job.execution) == ("FAILED", "prompt is required", 0)
    assert store.claim(1) == []


# Limits


def test_one_unfinished_job_too_many_is_refused(tmp_path: Path) -> None:
    store = JobStore(tmp_path, limits=Limits(max_unfinished=2))
    job = add_and_claim(store)
    store.add(new("b"))
    with pytest.raises(Overloaded, match=r"2 jobs are unfinished.*SDBENTO_MAX_JOBS"):
        store.add(new("c"))
    store.add(new("bad", error="not a job at all"))  # it needs no place in the queue
    store.fail(job, "makes room")
    store.add(new("c"))
    with pytest.raises(Overloaded):
        store.retry("a")
    assert not store.retry("bad") and not store.retry("unknown")
    store.close()


def test_inputs_have_a_limit_in_bytes(tmp_path: Path) -> None:
    store = JobStore(tmp_path, limits=Limits(max_bytes=1000))
    store.add(new("a", input="x" * 600))
    with pytest.raises(Overloaded, match="1000"):
        store.add(new("b", input="x" * 401))
    store.add(new("b", input="x" * 400))
    store.close()


def test_the_oldest_results_make_room(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(tmp_path, limits=Limits(max_finished=3, max_bytes=250), clock=clock)
    for job_id in "abcde":
        clock.now += 1
        store.complete(add_and_claim(store, job_id), b"x" * 100)
    assert store.tidy() == ["a", "b", "c"]  # three by number, one more by bytes
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"d.1.json", "e.1.json"}
    store.close()


def test_inputs_and_webhooks_do_not_count_towards_the_limit_on_results(tmp_path: Path) -> None:
    store = JobStore(tmp_path, limits=Limits(max_finished=1, max_bytes=100))
    store.complete(add_and_claim(store, "unposted", webhook="https://listener.example/"), b"x" * 60)
    store.complete(add_and_claim(store, "posted"), b"x" * 60)
    store.complete(add_and_claim(store, "newest"), b"x" * 30)
    store.add(new("waiting", input="x" * 90))
    assert store.tidy() == ["posted", "newest"]
    store.webhooks.note(current(store, "unposted"), again_in=None)
    assert store.tidy() == []
    store.close()


def test_a_webhook_that_has_failed_often_does_not_keep_results_where_room_is_needed(
    tmp_path: Path, clock: Clock
) -> None:
    store = JobStore(tmp_path, limits=Limits(max_bytes=100), clock=clock)
    for job_id in ("failing", "new"):
        job = add_and_claim(store, job_id, webhook="https://listener.example/")
        store.complete(job, b"x" * 60)
        clock.now += 1
    for posts in range(ENOUGH_POSTS):
        assert store.tidy() == [], posts
        store.webhooks.note(current(store, "failing"), again_in=HOUR)
    assert store.tidy() == ["failing"]
    store.close()


def test_jobs_whose_webhooks_must_still_be_posted_take_places(tmp_path: Path) -> None:
    """Whoever sends bad inputs with webhooks of a host that hangs would fill the table."""
    store = JobStore(tmp_path, limits=Limits(max_unfinished=2))
    for job_id in "ab":
        store.add(new(job_id, error="bad input", webhook="https://listener.example/"))
    with pytest.raises(Overloaded):
        store.add(new("c", error="bad input", webhook="https://listener.example/"))
    store.add(new("d", error="bad input"))
    store.webhooks.note(current(store, "a"), again_in=None)
    store.add(new("e"))
    for _ in range(ENOUGH_POSTS):
        store.webhooks.note(current(store, "b"), again_in=HOUR)
    store.add(new("f", error="bad input", webhook="https://listener.example/"))
    with pytest.raises(Overloaded):
        store.add(new("g"))
    store.close()


@pytest.mark.parametrize("end", ["complete", "fail", "time out", "cancel", "expire", "purge"])
def test_credentials_are_gone_when_a_job_ends(store: JobStore, clock: Clock, end: str) -> None:
    store.add(new(s3_config='{"accessSecret": "hush"}'))
    if end in ("complete", "fail", "time out", "cancel"):
        (job,) = store.claim(1)
        assert job.s3_config == '{"accessSecret": "hush"}'
        assert "hush" not in repr(job)
    match end:
        case "complete":
            store.complete(job, b"[]")
        case "fail":
            store.fail(job, "bad")
        case "time out":
            store.fail(job, "late", "TIMED_OUT")
        case "cancel":
            store.cancel("a")
        case "purge":
            store.purge()
        case "expire":
            clock.now += 100 * HOUR
            store.expire()
    assert not current(store).unfinished
    assert kept_to_run(store) == (None, None)
    assert not store.retry("a")  # it would deliver to another place


def test_credentials_survive_a_restart_of_a_job(store: JobStore) -> None:
    add_and_claim(store, s3_config="{}")
    store.recover()
    (job,) = store.claim(1)
    assert job.s3_config == "{}"


def test_a_bad_job_is_stored_without_credentials(store: JobStore) -> None:
    store.add(new(s3_config="{}", error="bad"))
    assert kept_to_run(store) == (None, None)


def test_no_error_of_the_database_shows_what_a_job_holds(store: JobStore) -> None:
    job = new(s3_config="hush", input="secret prompt")
    store.add(job)
    with pytest.raises(IntegrityError) as caught:
        store.add(job)
    assert "hush" not in str(caught.value) and "secret prompt" not in str(caught.value)


def test_only_the_servers_user_can_read_the_database(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    store.add(new())
    files = list(tmp_path.glob("jobs.db*"))
    assert len(files) > 1  # the log of SQLite as well
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    store.close()


def test_expired_results_are_removed(store: JobStore, clock: Clock, tmp_path: Path) -> None:
    store.complete(add_and_claim(store, "a"), b"[]")
    clock.now += HOUR - 1
    store.complete(add_and_claim(store, "b"), b"[]")
    store.add(new("waiting"))
    assert store.tidy() == []
    assert store.get("a") is not None
    clock.now += 1
    assert store.get("a") is None  # also while it is still there
    assert store.tidy() == ["a"]
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["b.1.json"]


def test_the_database_shrinks_when_jobs_are_removed(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    for i in range(20):
        store.add(new(str(i), input="x" * 100_000))
    store.purge()
    store.tidy()
    store.close()
    assert (tmp_path / "jobs.db").stat().st_size < 200_000


# Webhooks


def test_a_webhook_of_a_finished_job_is_due_until_it_is_posted(
    store: JobStore, clock: Clock
) -> None:
    job = add_and_claim(store, webhook="https://listener.example/")
    add_and_claim(store, "silent")
    assert store.webhooks.due(5, 5) == []
    store.complete(job, b"[]")
    (due,) = store.webhooks.due(5, 5)
    assert (due.id, due.webhook_posts) == ("a", 0)
    store.webhooks.note(due, again_in=500)
    assert store.webhooks.due(5, 5) == []
    clock.now += 500
    (due,) = store.webhooks.due(5, 5)
    assert due.webhook_posts == 1
    clock.now += 2 * HOUR
    assert store.tidy() == []  # not before the webhook is posted
    store.webhooks.note(due, again_in=None)
    assert store.webhooks.due(5, 5) == []
    assert store.tidy() == ["a"]


def test_a_late_answer_to_a_post_does_not_count_for_the_next_end(
    store: JobStore, clock: Clock
) -> None:
    store.add(new(webhook="https://listener.example/"))
    clock.now += 10 * HOUR
    store.expire()
    (first,) = store.webhooks.due(5, 5)
    store.retry("a")
    clock.now += 10 * HOUR
    store.expire()  # never started, so still the same run number
    store.webhooks.note(first, again_in=None)
    assert [job.id for job in store.webhooks.due(5, 5)] == ["a"]


def due(store: JobStore, limit: int, each: int, posting: tuple[str, ...] = ()) -> list[str]:
    return [job.id for job in store.webhooks.due(limit, each, posting)]


def test_many_posts_to_one_host_do_not_hide_those_to_others(store: JobStore, clock: Clock) -> None:
    hook = {"webhook": "https://slow.example/", "webhook_host": "slow.example", "error": "bad"}
    for i in range(50):
        store.add(new(f"s{i}", **hook, key_name="a"))
        clock.now += 1
    store.add(new("good", **hook | {"webhook_host": "good.example"}, key_name="a"))
    store.add(new("other", **hook, key_name="b"))
    assert due(store, 10, each=3) == ["s0", "other", "good", "s1", "s2"]
    posting = "s0", "s1", "gone"
    assert due(store, 10, each=3, posting=posting) == ["other", "good", "s2"]
    assert due(store, 2, each=3, posting=posting) == ["other", "good"]
    assert due(store, 10, each=3, posting=("s2", *posting, "other")) == ["good"]
    [first] = store.webhooks.due(1, each=1)
    store.webhooks.note(first, again_in=0)
    assert due(store, 10, each=1) == ["s1", "other", "good"]  # not s0 again: it had its turn


def test_inputs_are_read_to_run_a_job_only(store: JobStore) -> None:
    job = add_and_claim(store, webhook="https://listener.example/", input="x" * 1000)
    store.fail(job, "no")
    (posted,) = store.webhooks.due(1, each=1)
    assert posted.input is None and posted.error == "no"
    assert current(store).input is None
    assert kept_to_run(store) == ("x" * 1000, None)


@pytest.mark.parametrize("end", ["fail", "cancel", "purge", "expire", "bad"])
def test_every_end_makes_the_webhook_due(end: str, store: JobStore, clock: Clock) -> None:
    hook = "https://listener.example/"
    if end == "fail":
        store.fail(add_and_claim(store, webhook=hook), "no")
    else:
        store.add(new(webhook=hook, error="bad" if end == "bad" else None))
        clock.now += 10 * HOUR if end == "expire" else 0
        {
            "cancel": lambda: store.cancel("a"),
            "purge": lambda: store.purge(),
            "expire": store.expire,
        }.get(end, lambda: None)()
    assert [job.id for job in store.webhooks.due(5, 5)] == ["a"]


# A new start


def test_everything_is_kept_across_a_restart(tmp_path: Path, clock: Clock) -> None:
    store = JobStore(tmp_path, clock=clock)
    store.complete(add_and_claim(store, "done"), b'["picture"]')
    add_and_claim(store, "running", input='{"seed": 5}')
    store.add(new("queued"))
    store.close()

    clock.now += 1000
    store = JobStore(tmp_path, clock=clock)
    assert store.recover() == 1
    assert store.result(current(store, "done")) == b'["picture"]'
    running, queued = store.claim(5)
    assert (running.id, running.run, running.input) == ("running", 2, '{"seed": 5}')
    assert running.delay == 1000
    assert queued.id == "queued"
    store.close()


def test_a_clock_that_was_set_back_holds_nothing_up(store: JobStore, clock: Clock) -> None:
    store.complete(add_and_claim(store, "done", webhook="https://listener.example/"), b"[]")
    (due,) = store.webhooks.due(1, 1)
    store.webhooks.note(due, again_in=500)
    add_and_claim(store, "running")
    store.add(new("queued"))
    clock.now -= 5 * HOUR
    store.recover()
    (due,) = store.webhooks.due(5, 5)
    assert (due.id, due.webhook_posts) == ("done", 1)
    store.webhooks.note(due, again_in=None)
    assert [job.delay for job in store.claim(5)] == [0, 0]
    clock.now += HOUR
    assert store.tidy() == ["done"]


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_step_of_the_clock_ends_no_job(
    hours: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(tmp_path)
    store.complete(add_and_claim(store, "done", webhook="https://listener.example/"), b"[]")
    store.add(new("queued"))
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + hours * HOUR * 1_000_000)
    monkeypatch.setattr(time, "time", lambda: time.time_ns() / 1e9)
    assert store.expire() == []
    assert store.tidy() == []
    assert [job.id for job in store.webhooks.due(5, 5)] == ["done"]
    (job,) = store.claim(5)
    assert job.delay is not None and job.delay < HOUR
    store.close()


def crash_servers(store: JobStore, times: int) -> None:
    """The server crashes several times, each time soon after it has claimed all jobs it can."""
    for _ in range(times):
        store.claim(5)
        store.recover()


def test_a_job_present_at_three_crashes_runs_alone(store: JobStore) -> None:
    store.add(new("a"))
    store.add(new("b"))
    crash_servers(store, SUSPECT_INTERRUPTIONS)
    store.add(new("c"))
    store.add(new("d"))
    (alone,) = store.claim(5)
    assert alone.id == "a"
    assert store.claim(5) == []
    store.complete(alone, b"[]")
    (alone,) = store.claim(5)
    assert (alone.id, store.claim(5)) == ("b", [])
    store.fail(alone, "no")
    others = store.claim(5)
    assert [job.id for job in others] == ["c", "d"]


def test_a_suspect_waits_until_it_can_run_alone(store: JobStore) -> None:
    store.add(new("suspect", low_priority=True))
    crash_servers(store, SUSPECT_INTERRUPTIONS)
    store.add(new("other"))
    (other,) = store.claim(5)
    assert (other.id, store.claim(5)) == ("other", [])
    store.complete(other, b"[]")
    (alone,) = store.claim(5)
    assert alone.id == "suspect"


def test_a_job_that_crashes_every_server_fails(store: JobStore) -> None:
    store.add(new("killer", webhook="https://a.example"))
    crash_servers(store, MAX_INTERRUPTIONS - 1)
    assert current(store, "killer").status == "IN_QUEUE"
    store.claim(5)
    assert store.recover() == 0
    killer = current(store, "killer")
    assert (killer.status, killer.run) == ("FAILED", MAX_INTERRUPTIONS)
    assert "died 20 times while it ran this job" in str(killer.error)
    assert [job.id for job in store.webhooks.due(5, 5)] == ["killer"]
    assert store.retry("killer")
    crash_servers(store, 2)
    assert current(store, "killer").status == "IN_QUEUE"


DIE_WHILE_WRITING = """
import os, sys
from pathlib import Path
from sdbento.jobs.store.job_store import JobStore
store = JobStore(Path(sys.argv[1]))
jobs = store.claim(3)
store.complete(jobs[0], b'["whole"]')
store._results.write(jobs[1].id, jobs[1].run, b'["written, and no row says so"]')
(Path(sys.argv[1]) / "results" / "c.1.tmp").write_bytes(b'["ha')
os.kill(os.getpid(), 9)
"""


def test_a_killed_process_loses_no_result_and_leaves_no_stray_files(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    for job_id in "abc":
        store.add(new(job_id))
    store.close()
    command = [sys.executable, "-c", DIE_WHILE_WRITING, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT).returncode == -9
    store = JobStore(tmp_path)
    assert store.recover() == 2
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["a.1.json"]
    assert store.result(current(store, "a")) == b'["whole"]'
    assert [(job.id, job.run) for job in store.claim(5)] == [("b", 2), ("c", 2)]
    store.close()


def test_a_removed_results_folder_is_created_again(store: JobStore, tmp_path: Path) -> None:
    (tmp_path / "results").rmdir()
    store.complete(add_and_claim(store), b"[]")
    assert store.result(current(store)) == b"[]"


@pytest.mark.parametrize("left", [None, b"", b'["pict'])
def test_a_damaged_result_is_none(store: JobStore, tmp_path: Path, left: bytes | None) -> None:
    store.complete(add_and_claim(store), b'["picture"]')
    [path] = (tmp_path / "results").iterdir()
    path.unlink() if left is None else path.write_bytes(left)
    with pytest.raises(NotFound, match="the result of job a is no longer there"):
        store.result(current(store))


def test_a_second_database_does_not_remove_the_results_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(tmp_path)
    store.complete(add_and_claim(store), b"[]")
    store.close()
    other = JobStore(tmp_path, f"sqlite:///{tmp_path / 'other.db'}")
    other.recover()
    other.close()
    store = JobStore(tmp_path)
    assert store.result(current(store)) == b"[]"
    store.close()
    monkeypatch.setattr(job_results, "STRAY_SECONDS", -1.0)
    other = JobStore(tmp_path, f"sqlite:///{tmp_path / 'other.db'}")
    other.recover()
    assert list((tmp_path / "results").iterdir()) == []
    other.close()


def test_a_result_that_cannot_be_written_leaves_the_job_running(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = add_and_claim(store)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.complete(job, b"[]")
    assert current(store).status == "IN_PROGRESS"
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_commits_survive_a_power_failure(store: JobStore, tmp_path: Path) -> None:
    with store._database.engine.connect() as connection:
        answers = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous")
        ]
    assert answers == ["wal", 2]


def test_a_folder_in_place_of_the_database_is_reported(tmp_path: Path) -> None:
    (tmp_path / "jobs.db").write_text("this is not a database, but text, and quite long enough")
    with pytest.raises(Exception, match="not a database") as caught:
        JobStore(tmp_path)
    assert isinstance(caught.value.__cause__, sqlite3.DatabaseError)
