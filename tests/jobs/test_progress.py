"""Events that are kept until a client asks for them."""

from __future__ import annotations

from sdbento.jobs.progress import MAX_EVENTS, MAX_JOBS, JobProgress, ProgressOfJobs


def test_only_the_newest_preview_is_kept() -> None:
    progress = JobProgress()
    for step in range(3):
        progress.push({"event": "step", "image": 0, "step": step})
        progress.push({"event": "preview", "image": 0, "step": step})
    kinds = [(event["event"], event["step"]) for event in progress.take_all()]
    assert kinds == [("step", 0), ("step", 1), ("step", 2), ("preview", 2)]


def test_progress_is_bounded() -> None:
    every = ProgressOfJobs()
    for i in range(MAX_JOBS + 5):
        every.of(str(i)).push({"event": "queued"})
    assert every.of("0").take_all() == []
    assert every.of(str(MAX_JOBS)).take_all() != []
    for _ in range(MAX_EVENTS + 5):
        every.of("x").push({"event": "step"})
    assert len(every.of("x").take_all()) == MAX_EVENTS
