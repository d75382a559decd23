"""Events that are kept until a client asks for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sdbento.jobs.progress import MAX_EVENTS, MAX_JOBS, JobProgress, ProgressOfJobs
from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.table import Job
from tests.support.jobs import add_and_claim


def test_only_the_newest_preview_is_kept() -> None:
    progress = JobProgress()
    for step in range(3):
        progress.push({"event": "step", "image": 0, "step": step})
        progress.push({"event": "preview", "image": 0, "step": step})
    kinds = [(event["event"], event["step"]) for event in progress.take_all()]
    assert kinds == [("step", 0), ("step", 1), ("step", 2), ("preview", 2)]


def jobs_of(folder: Path, owner: str) -> list[Job]:
    """One job more than have progress."""
    store = JobStore(folder)
    job = add_and_claim(store, key_name=owner)
    store.close()
    return [replace(job, id=f"{owner} {i}") for i in range(MAX_JOBS + 1)]


def test_progress_is_bounded(tmp_path: Path) -> None:
    every, jobs = ProgressOfJobs(), jobs_of(tmp_path, "a")
    for job in jobs:
        every.of(job).push({"event": "queued"})
    assert every.of(jobs[0]).take_all() == []
    assert every.of(jobs[-1]).take_all() != []
    for _ in range(MAX_EVENTS + 5):
        every.of(jobs[0]).push({"event": "step"})
    assert len(every.of(jobs[0]).take_all()) == MAX_EVENTS


def test_nobody_drives_out_the_progress_of_another(tmp_path: Path) -> None:
    every, jobs = ProgressOfJobs(), jobs_of(tmp_path, "a")
    of_b = replace(jobs[0], key_name="b", id="b")
    every.of(of_b).push({"event": "step"})
    for job in jobs:
        every.of(job)
    assert len(every.of(of_b)) == 1
