"""A job from its claim to its end, on a fake App."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from sdbento.errors import (
    DeadlineExceeded,
    GenerationFailed,
    Overloaded,
    Unavailable,
)
from sdbento.jobs.runpod_format import new_job
from sdbento.jobs.table import Job
from sdbento.request.schema import GenerateResponse
from tests.support.job_server import QUICKLY, SETTINGS, Server, serving, until


async def test_a_job_makes_an_image(server: Server) -> None:
    job_id = await server.submit()
    assert (await server.ended(job_id)).status == "COMPLETED"
    answer = await server.answer(job_id)
    seed = server.app.begun[0].seed
    assert answer["output"] == [b64encode(f"quick {seed}".encode()).decode()]
    assert (answer["id"], answer["status"]) == (job_id, "COMPLETED")
    assert answer["delayTime"] >= 0 <= answer["executionTime"]
    assert "error" not in answer


async def test_a_job_may_ask_for_the_full_response(server: Server) -> None:
    job_id = await server.submit(input={"prompt": "x", "seed": 3, "return": "full"})
    await server.ended(job_id)
    output = (await server.answer(job_id))["output"]
    assert set(output) == set(GenerateResponse.model_fields)
    assert output["seeds"] == [3]


async def test_a_job_that_cannot_be_done_fails_with_one_line(server: Server) -> None:
    server.app.failures["x"] = [GenerationFailed("the sampler\n diverged")]
    job = await server.ended(await server.submit("x"))
    assert (job.status, job.error) == ("FAILED", "the sampler diverged")
    server.app.failures["y"] = [KeyError("secret")]
    job = await server.ended(await server.submit("y"))
    assert job.error is not None and "secret" not in job.error and "id " in job.error


async def test_no_more_jobs_run_than_the_engine_can_use(server: Server) -> None:
    ids = [await server.submit(f"slow {i}") for i in range(9)]
    await server.runs(*(f"slow {i}" for i in range(4)))  # in any order
    counts = await server.jobs.counts()
    assert (counts.by_status["IN_PROGRESS"], counts.by_status["IN_QUEUE"]) == (4, 5)
    server.app.gate.set()
    for job_id in ids:
        assert (await server.ended(job_id)).status == "COMPLETED"
    assert server.app.peak == 4 == 2 * SETTINGS.max_batch_size
    first = {request.prompt for request in server.app.begun[:4]}
    assert first == {f"slow {i}" for i in range(4)}


async def test_low_priority_jobs_run_last(server: Server) -> None:
    first, *_ = [await server.submit(f"slow {i}") for i in range(4)]
    await server.submit("slow whenever", policy={"lowPriority": True})
    await server.submit("slow please")
    await server.jobs.cancel(first)
    await server.runs("slow please")
    assert "slow whenever" not in {request.prompt for request in server.app.begun}


async def test_a_job_waits_while_the_app_has_no_room(server: Server) -> None:
    server.app.failures["x"] = [Overloaded("the queue is full") for _ in range(3)]
    job = await server.ended(await server.submit("x"))
    assert (job.status, job.run) == ("COMPLETED", 4)
    assert len({request.seed for request in server.app.begun}) == 1


# Stopping


async def test_a_running_job_stops_when_it_is_cancelled(server: Server) -> None:
    job_id = await server.submit("slow")
    await server.runs("slow")
    assert (await server.jobs.cancel(job_id)).status == "CANCELLED"
    await until(lambda: server.app.cut_short == ["slow"])
    assert (await server.answer(job_id))["status"] == "CANCELLED"
    await until(lambda: server.jobs.num_running == 0)


async def test_jobs_that_are_cancelled_at_any_moment_free_their_places(server: Server) -> None:
    for i in range(30):
        job_id = await server.submit("slow")
        await asyncio.sleep(0.0005 * i)
        assert (await server.jobs.cancel(job_id)).status == "CANCELLED"
    await until(lambda: server.jobs.num_running == 0)
    assert (await server.ended(await server.submit())).status == "COMPLETED"


async def test_a_job_that_runs_for_too_long_times_out_and_stops(server: Server) -> None:
    new = new_job(b'{"input": {"prompt": "slow"}}', SETTINGS, sync=False)
    await server.jobs.submit(type(new)(**(vars(new) | {"execution_timeout": 100})))
    job = await server.ended(new.id)
    assert job.status == "TIMED_OUT"
    assert job.error is not None and "100 ms" in job.error
    assert server.app.cut_short == ["slow"]


async def test_a_job_that_outlives_its_ttl_times_out_and_stops(server: Server) -> None:
    new = new_job(b'{"input": {"prompt": "slow"}}', SETTINGS, sync=False)
    await server.jobs.submit(type(new)(**(vars(new) | {"ttl": 300})))
    job = await server.ended(new.id)
    assert (job.status, job.run) == ("TIMED_OUT", 1)
    assert job.error is not None and "its ttl of 300 ms" in job.error
    assert server.app.cut_short == ["slow"]


async def test_a_deadline_of_the_engine_is_a_timeout_too(server: Server) -> None:
    server.app.failures["x"] = [DeadlineExceeded("cannot be done within its timeout")]
    job = await server.ended(await server.submit("x", policy={"executionTimeout": 90_000}))
    assert job.status == "TIMED_OUT"
    assert server.app.seconds == [90.0]


async def test_a_request_within_a_job_may_only_take_less_time_than_the_job(server: Server) -> None:
    policy = {"executionTimeout": 5_000_000}
    for timeout in (None, 3000, 3):
        given = {"prompt": "x", "timeout": timeout}
        await server.ended(await server.submit(input=given, policy=policy))
    assert server.app.seconds == [5000.0, 3000.0, 3.0]


async def test_a_job_that_waits_for_too_long_times_out(server: Server) -> None:
    for i in range(4):
        await server.submit(f"slow {i}")
    new = new_job(b'{"input": {"prompt": "late"}}', SETTINGS, sync=False)
    await server.jobs.submit(type(new)(**(vars(new) | {"ttl": 100})))
    assert (await server.ended(new.id)).status == "TIMED_OUT"


# A store that is away


async def test_no_result_is_lost_while_the_database_is_away(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = {"complete": 2, "get": 0}

    def refusing(name: str) -> None:
        function = getattr(server.store, name)

        def sometimes(*args: Any) -> Any:
            if refusals[name] > 0:
                refusals[name] -= 1
                raise OperationalError("UPDATE jobs", None, Exception("the server is gone"))
            return function(*args)

        monkeypatch.setattr(server.store, name, sometimes)

    refusing("complete")
    refusing("get")
    job_id = await server.submit()
    refusals["get"] = 1  # met by the job's run: this test reads a moment later
    await until(lambda: not refusals["get"] and not refusals["complete"])
    assert (await server.ended(job_id)).status == "COMPLETED"


async def test_jobs_whose_claim_got_no_answer_are_claimed_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = server.store.claim
    lost: list[Job] = []

    def answer_lost(limit: int, **options: Any) -> list[Job]:
        claimed = claim(limit, **options)
        if claimed and not lost:
            lost.extend(claimed)
            raise OperationalError("COMMIT", None, Exception("the connection is closed"))
        return claimed

    running = await server.submit("slow")
    await server.runs("slow")
    monkeypatch.setattr(server.store, "claim", answer_lost)
    job_id = await server.submit()
    assert (await server.ended(job_id)).status == "COMPLETED"
    assert [job.id for job in lost] == [job_id]
    assert (await server.jobs.get(running)).status == "IN_PROGRESS"
    assert [request.prompt for request in server.app.begun] == ["slow", "quick"]


async def test_a_store_taken_over_by_another_server_is_left_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock = SimpleNamespace(ensure_held=lambda: None, close=lambda: None)
    server.store._database._locks.append(lock)  # type: ignore[arg-type]
    job_id = await server.submit("slow")
    await server.runs("slow")

    def lost() -> None:
        raise Unavailable("another server has it")

    lock.ensure_held = lost
    server.app.gate.set()
    await until(lambda: server.jobs.num_running == 0)
    for ask in (server.jobs.get(job_id), server.jobs.cancel(job_id), server.jobs.counts()):
        with pytest.raises(Unavailable, match="another server has it"):
            await ask
    assert "what became of job" in caplog.text
    lock.ensure_held = lambda: None  # and has ended
    await until(lambda: server.store._database._lost is None)
    assert (await server.ended(job_id)).status == "COMPLETED"


async def test_results_wait_while_the_disk_is_full(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(server.store._results, "write", full)
        job_id = await server.submit()
        await until(lambda: "cannot be kept yet: the disk is full" in caplog.text)
        assert (await server.jobs.get(job_id)).status == "IN_PROGRESS"
    assert (await server.ended(job_id)).status == "COMPLETED"


async def test_a_job_waits_while_the_database_does_not_answer_whether_it_is_cancelled(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    get, failures = server.store.get, [OSError(5, "Input/output error")]

    def sometimes(job_id: str) -> Job | None:
        if failures:
            raise failures.pop()
        return get(job_id)

    monkeypatch.setattr(server.store, "get", sometimes)
    job_id = await server.submit()
    await until(lambda: f"job {job_id} cannot be read yet" in caplog.text)
    assert (await server.ended(job_id)).status == "COMPLETED"


async def test_jobs_of_a_server_that_must_be_replaced_are_run_by_the_next(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        job_id = await server.submit("slow")
        await server.runs("slow")
        server.app.failures["slow"] = [Unavailable("the device has failed")]
        server.app.alive = False
        server.app.gate.set()
        await until(lambda: server.jobs.num_running == 0)
        waiting = await server.submit()
        await asyncio.sleep(3 * QUICKLY.expiry)
        assert (await server.jobs.get(waiting)).status == "IN_QUEUE"
        assert (await server.jobs.get(job_id)).status == "IN_PROGRESS"
    async with serving(tmp_path) as server:
        server.app.gate.set()
        for done in (await server.ended(job_id), await server.ended(waiting)):
            assert done.status == "COMPLETED"
        assert [(await server.jobs.get(one)).run for one in (job_id, waiting)] == [2, 1]


async def test_a_job_whose_run_dies_of_a_bug_is_run_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    complete, bugs = server.store.complete, [TypeError("a bug"), TypeError("a bug")]

    def sometimes(job: Job, output: bytes) -> bool:
        if bugs:
            raise bugs.pop()
        return complete(job, output)

    monkeypatch.setattr(server.store, "complete", sometimes)
    monkeypatch.setattr(server.store, "fail", lambda *_: 1 / 0)
    job = await server.ended(await server.submit())
    assert (job.status, job.run) == ("COMPLETED", 3)
    assert f"the task 'sdbento job {job.id}' died" in caplog.text
