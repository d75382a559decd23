"""Jobs as the doors use them, and their start and stop, on a fake App."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from base64 import b64decode
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from sdbento.engine.handle import Stepped
from sdbento.errors import (
    GenerationFailed,
    InvalidParameter,
    LimitReached,
    MalformedRequest,
    NotFound,
    OutOfMemory,
    Overloaded,
    Unavailable,
)
from sdbento.jobs.dispatcher import Intervals
from sdbento.jobs.progress import MAX_JOBS
from sdbento.jobs.runpod_format import new_job
from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.store.room import Limits
from sdbento.jobs.table import Job, jobs
from sdbento.metrics.definitions import route
from sdbento.request.events import Done, Event
from sdbento.request.schema import GenerateRequest
from tests.support.job_server import (
    QUICKLY,
    SETTINGS,
    SOON,
    FakeApp,
    Server,
    response_to,
    serving,
    until,
)
from tests.support.metrics import counted
from tests.support.s3 import SECRET, storing

# What is accepted


async def test_a_bad_input_is_accepted_and_fails(server: Server) -> None:
    job_id = await server.submit(input={"prompt": "x", "width": 513})
    answer = await server.answer(job_id)
    assert answer["status"] == "FAILED"
    assert "multiple of 8" in answer["error"] and "\n" not in answer["error"]
    assert server.app.begun == []


async def test_the_result_of_a_job_with_a_bucket_is_there_and_its_key_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with storing() as store:
        s3_config = {
            "accessId": "AKIAID",
            "accessSecret": SECRET,
            "bucketName": "pictures",
            "endpointUrl": store.url,
        }
        async with serving(tmp_path) as server:
            job_id = await server.submit("slow", s3Config=s3_config)
            await server.runs("slow")
            assert SECRET not in str(await server.answer(job_id))
            server.app.gate.set()
            await server.ended(job_id)
            answer = await server.answer(job_id)
        [url] = answer["output"]
        assert url.startswith(f"{store.url}/pictures/{job_id}/0-")
        [(_, data)] = store.objects.values()
        assert data.startswith(b"slow ")
    assert SECRET not in str(answer) + caplog.text
    assert not [path for path in tmp_path.rglob("*") if contains(path, SECRET)]


def contains(path: Path, text: str) -> bool:
    return path.is_file() and text.encode() in path.read_bytes()


async def test_a_job_whose_bucket_refuses_fails_and_is_not_retried(tmp_path: Path) -> None:
    with storing() as store:
        store.statuses = [404]
        given = {"accessId": "a", "accessSecret": SECRET, "bucketName": "gone"}
        async with serving(tmp_path) as server:
            job_id = await server.submit(s3Config={**given, "endpointUrl": store.url})
            await server.ended(job_id)
            answer = await server.answer(job_id)
            assert answer["status"] == "FAILED"
            assert "its host answered 404" in answer["error"]
            with pytest.raises(MalformedRequest, match="s3Config"):
                await server.jobs.retry(job_id)


CALL = {"prompt": "quick", "steps": 4}


async def test_a_job_may_be_a_call_of_another_api(server: Server) -> None:
    job_id = await server.submit(input=CALL)
    await server.ended(job_id)
    output = (await server.answer(job_id))["output"]
    assert set(output) == {"images", "parameters", "info"}
    assert output["info"] == "POST /sdapi/v1/txt2img"
    assert int(b64decode(output["images"][0])) >= 0  # the fake's picture is the seed


async def test_a_call_that_finds_no_room_is_made_again_and_one_that_is_refused_fails(
    server: Server,
) -> None:
    failures: list[Exception] = [Overloaded("full"), InvalidParameter("no such thing")]
    server.app.failures["/sdapi/v1/txt2img"] = failures
    job_id = await server.submit(input=CALL)
    await server.ended(job_id)
    assert (await server.answer(job_id))["error"] == "no such thing"
    assert failures == []


async def test_a_call_is_cancelled_and_timed_out_like_any_job(server: Server) -> None:
    slow = {**CALL, "prompt": "slow"}
    cancelled = await server.submit(input=slow)
    await until(lambda: server.jobs.num_running)
    await server.jobs.cancel(cancelled)
    await until(lambda: not server.jobs.num_running)
    store = server.store
    store.add(replace(new_job(as_body(slow), SETTINGS, sync=False), execution_timeout=50))
    await until(lambda: store.counts().by_status["TIMED_OUT"])


def as_body(given: dict[str, Any]) -> bytes:
    return json.dumps({"input": given}).encode()


async def test_the_images_of_a_call_go_to_the_bucket_of_its_job(tmp_path: Path) -> None:
    given = {"accessId": "a", "accessSecret": SECRET, "bucketName": "pictures"}
    with storing() as store:
        async with serving(tmp_path) as server:
            job_id = await server.submit(input=CALL, s3Config={**given, "endpointUrl": store.url})
            await server.ended(job_id)
            output = (await server.answer(job_id))["output"]
        assert output["images"][0].startswith(f"{store.url}/pictures/{job_id}/0-")
        assert output["info"] == "POST /sdapi/v1/txt2img"


async def test_too_many_jobs_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(max_unfinished=1)) as server:
        await server.submit("slow")
        with pytest.raises(Overloaded) as caught:
            await server.submit()
        assert caught.value.retry_after == 3.0


# What clients ask


async def test_a_waiting_job_that_is_cancelled_never_starts(server: Server) -> None:
    for i in range(4):
        await server.submit(f"slow {i}")
    job_id = await server.submit("never")
    assert (await server.jobs.cancel(job_id)).status == "CANCELLED"
    server.app.gate.set()
    await server.ended(await server.submit("after"))
    assert "never" not in {request.prompt for request in server.app.begun}


async def test_purging_leaves_running_jobs_alone(server: Server) -> None:
    ids = [await server.submit(f"slow {i}") for i in range(7)]
    await server.runs("slow 3")
    waiting = asyncio.create_task(server.ended(ids[-1]))
    assert await server.jobs.purge() == 3
    assert (await waiting).status == "CANCELLED"
    server.app.gate.set()
    assert (await server.ended(ids[0])).status == "COMPLETED"


async def test_only_a_failed_job_can_be_retried(server: Server) -> None:
    server.app.failures["x"] = [GenerationFailed("bad luck")]
    job_id = await server.submit("x")
    assert (await server.ended(job_id)).status == "FAILED"
    await server.jobs.retry(job_id)
    assert (await server.ended(job_id)).status == "COMPLETED"
    assert len({request.seed for request in server.app.begun}) == 1
    with pytest.raises(MalformedRequest, match="COMPLETED"):
        await server.jobs.retry(job_id)
    bad = await server.submit(input={})
    with pytest.raises(MalformedRequest, match="FAILED: prompt is required"):
        await server.jobs.retry(bad)


async def test_an_unknown_job_is_not_found(server: Server) -> None:
    for ask in (server.jobs.get, server.jobs.cancel, server.jobs.retry):
        with pytest.raises(NotFound, match="'abc'"):
            await ask("abc")
    with pytest.raises(NotFound):
        await server.jobs.wait("abc", SOON)


async def test_waiting_for_a_job_ends_after_the_given_time(server: Server) -> None:
    job_id = await server.submit("slow")
    await server.runs("slow")
    job = await server.jobs.wait(job_id, 0.1)
    assert job.status == "IN_PROGRESS"
    assert await server.answer(job_id) == {
        "id": job_id, "status": "IN_PROGRESS", "delayTime": job.delay
    }  # fmt: skip


# Progress


async def test_a_stream_sends_each_event_once_and_ends_with_the_output(server: Server) -> None:
    job_id = await server.submit("slow")
    await server.runs("slow")
    await until(lambda: server.jobs._progress._jobs.get(job_id))
    await asyncio.sleep(0.05)
    job, events = await server.jobs.stream(job_id, SOON)
    assert job.status == "IN_PROGRESS"
    assert [event["event"] for event in events] == ["queued", "step", "step"]
    assert (await server.jobs.stream(job_id, 0.01))[1] == []
    server.app.gate.set()
    await server.ended(job_id)
    job, events = await server.jobs.stream(job_id, SOON)
    assert job.status == "COMPLETED"
    assert events == [{"event": "done", "output": (await server.answer(job_id))["output"]}]
    assert (await server.jobs.stream(job_id, SOON))[1] == []


async def test_a_stream_waits_for_the_next_event(server: Server) -> None:
    job_id = await server.submit("slow")
    await server.runs("slow")
    seen: list[dict[str, Any]] = []
    while len(seen) < 3:
        seen += (await server.jobs.stream(job_id, SOON))[1]
    waiting = asyncio.create_task(server.jobs.stream(job_id, SOON))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await server.jobs.cancel(job_id)
    job, events = await waiting
    assert (job.status, events) == ("CANCELLED", [])


async def test_the_progress_of_a_running_job_is_kept_while_others_are_read(
    server: Server,
) -> None:
    async def steps(
        request: GenerateRequest, seconds: float | None = None
    ) -> AsyncGenerator[Event, None]:
        yield Stepped(image=0, step=1, num_steps=2, eta=0.5)
        await server.app.gate.wait()
        yield Stepped(image=0, step=2, num_steps=2, eta=0.0)
        yield Done(response_to(request))

    server.app.stream = steps  # type: ignore[method-assign]
    job_id = await server.submit()
    first = {"event": "step", "image": 0, "step": 1, "num_steps": 2, "eta": 0.5}
    job, events = await server.jobs.stream(job_id, SOON)
    assert events == [first]
    for i in range(MAX_JOBS):
        server.jobs._progress.of(replace(job, id=str(i)))
    server.app.gate.set()
    await server.ended(job_id)
    events = (await server.jobs.stream(job_id, SOON))[1]
    assert [event["event"] for event in events] == ["step", "done"]


# A new start


async def test_running_and_waiting_jobs_are_done_after_a_restart(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        done = await server.submit("quick")
        await server.ended(done)
        ids = [await server.submit(f"slow {i}") for i in range(6)]
        await server.runs("slow 3")
        first = {request.prompt: request.seed for request in server.app.begun}
        before = await server.answer(done)
    assert server.app.cut_short == [f"slow {i}" for i in range(4)]
    app = FakeApp()
    app.gate.set()
    async with serving(tmp_path, app) as server:
        for job_id in ids:
            assert (await server.ended(job_id)).status == "COMPLETED"
        assert await server.answer(done) == before
        again = {request.prompt: request.seed for request in app.begun}
        assert sorted(again) == [f"slow {i}" for i in range(6)]  # each once, without the done one
        assert {prompt: again[prompt] for prompt in first if prompt in again} == {
            prompt: seed for prompt, seed in first.items() if prompt != "quick"
        }


async def test_running_jobs_may_finish_when_the_server_stops(tmp_path: Path) -> None:
    async with serving(tmp_path, intervals=Intervals(expiry=0.05, grace=SOON)) as server:
        job_id = await server.submit("slow")
        await server.runs("slow")
        asyncio.get_running_loop().call_later(0.1, server.app.gate.set)
    store = JobStore(tmp_path)
    job = store.get(job_id)
    assert job is not None and job.status == "COMPLETED"
    store.close()


async def test_a_job_dropped_by_a_closing_engine_does_not_fail(tmp_path: Path) -> None:
    async with serving(tmp_path, intervals=Intervals(expiry=0.05, grace=SOON)) as server:
        server.app.failures["slow"] = [Unavailable("the server stopped")]
        job_id = await server.submit("slow")
        await server.runs("slow")
        asyncio.get_running_loop().call_later(0.1, server.app.gate.set)
    store = JobStore(tmp_path)
    job = store.get(job_id)
    assert job is not None and job.status == "IN_QUEUE"
    store.close()


async def test_clients_that_wait_for_a_job_are_answered_when_the_server_stops(
    server: Server,
) -> None:
    running = [await server.submit(f"slow {i}") for i in range(4)]
    queued = await server.submit()
    await server.runs(*(f"slow {i}" for i in range(4)))
    waiting = [asyncio.create_task(server.jobs.wait(i, SOON)) for i in (running[0], queued)]
    await server.jobs.stream(running[0], SOON)
    streaming = asyncio.create_task(server.jobs.stream(running[0], SOON))
    await asyncio.sleep(0.05)
    server.jobs.prepare_to_stop()
    statuses = [(await asyncio.wait_for(task, 1)).status for task in waiting]
    assert statuses == ["IN_PROGRESS", "IN_QUEUE"]
    assert (await asyncio.wait_for(streaming, 1))[0].status == "IN_PROGRESS"
    await asyncio.wait_for(server.jobs.wait(queued, SOON), 1)
    server.app.gate.set()  # running jobs may finish, and no new one starts
    await until(lambda: server.jobs.num_running == 0)
    assert (await server.jobs.get(running[0])).status == "COMPLETED"
    assert (await server.jobs.get(queued)).status == "IN_QUEUE"


async def test_a_server_that_stops_while_it_starts_jobs_queues_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as server:
        claim, begun = server.store.claim, threading.Event()

        def slowly(limit: int, **options: Any) -> list[Job]:
            claimed = claim(limit, **options)
            if claimed:
                begun.set()
                time.sleep(0.2)
            return claimed

        monkeypatch.setattr(server.store, "claim", slowly)
        job_id = await server.submit("slow")
        await until(begun.is_set)
    store = JobStore(tmp_path)
    job = store.get(job_id)
    assert job is not None and job.status == "IN_QUEUE"
    store.close()


async def test_results_are_removed_when_they_expire(server: Server) -> None:
    new = new_job(b'{"input": {"prompt": "x"}}', SETTINGS, sync=False)
    await server.jobs.submit(type(new)(**(vars(new) | {"keep": 1})))
    await until(lambda: server.store.get(new.id) is None)
    with pytest.raises(NotFound, match="expired"):
        await server.jobs.get(new.id)


# Bugs


@pytest.mark.parametrize(
    ("method", "task"),
    [
        ("_dispatcher._claim", "sdbento job dispatcher"),
        ("_webhooks._start_due", "sdbento webhooks"),
        ("_progress.forget", "sdbento job tidying"),
    ],
)
async def test_a_background_task_that_dies_is_reported_by_the_server(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
    task: str,
) -> None:
    class Bug(BaseException):
        """An exception that no error handler catches."""

    def die(*_: object) -> None:
        raise Bug

    done = await server.submit()
    await server.ended(done)
    owner, _, name = method.partition(".")
    monkeypatch.setattr(getattr(server.jobs, owner), name, die)
    await until(lambda: server.app.broken)
    assert f"the task '{task}' died" in caplog.text and "Bug" in caplog.text
    with pytest.raises(Unavailable, match="must be restarted"):
        await server.submit()
    assert (await server.answer(done))["status"] == "COMPLETED"  # results can still be fetched


async def test_a_healthy_or_stopping_server_reports_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        await server.ended(await server.submit())
    assert server.app.broken == []


# What is counted


async def test_a_job_is_counted_once_when_it_ends_by_the_route_that_it_came_by(
    server: Server,
) -> None:
    route.expect("/run", "/runsync")
    before = counted()
    server.app.failures["x"] = [GenerationFailed("bad luck")]
    server.app.failures["y"] = [LimitReached("wait"), Overloaded("full"), OutOfMemory("too large")]
    for prompt, sync in (("quick", True), ("quick", False), ("x", False), ("y", False)):
        await server.ended(await server.submit(prompt, sync=sync))
    running = [await server.submit(f"slow {i}") for i in range(4)]
    await server.runs("slow 3")
    waiting = [await server.submit(f"later {i}") for i in range(3)]
    await server.jobs.cancel(waiting[0])
    await server.jobs.cancel(waiting[0])
    await server.jobs.purge()
    await server.jobs.cancel(running[0])
    server.app.gate.set()
    for job_id in running[1:]:
        await server.ended(job_id)
    await until(lambda: not server.jobs._dispatcher._running)
    requests = "sdbento_requests_total{{model=none,outcome={},route={}}}".format
    assert counted().since(before) == {
        requests("ok", "/runsync"): 1,
        requests("ok", "/run"): 4,
        requests("failed", "/run"): 1,
        requests("out_of_memory", "/run"): 1,
        requests("cancelled", "/run"): 4,
        "sdbento_cancelled_total{reason=cancel}": 2,
        "sdbento_cancelled_total{reason=purge}": 2,
        "sdbento_request_seconds_count": 8,
    }


async def test_a_job_that_is_begun_just_as_it_is_cancelled_is_counted_once(server: Server) -> None:
    before = counted()
    ids = [await server.submit(f"slow {i}") for i in range(12)]
    await server.runs("slow 3")
    for job_id in ids:  # each that runs makes room for the next
        await server.jobs.cancel(job_id)
    await until(lambda: not server.jobs._dispatcher._running)
    assert counted().since(before)["sdbento_cancelled_total{reason=cancel}"] == 12


async def test_a_job_that_expires_in_the_queue_is_counted(tmp_path: Path) -> None:
    route.expect("/run")
    before = counted()
    async with serving(tmp_path) as server:
        for i in range(4):
            await server.submit(f"slow {i}")
        job_id = await server.submit("never", policy={"ttl": 10_000})
        with server.store._database.engine.begin() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(expires=0))
        assert (await server.ended(job_id)).status == "TIMED_OUT"
        server.app.gate.set()
    grown = counted().since(before)
    assert grown["sdbento_requests_total{model=none,outcome=timeout,route=/run}"] == 1


async def test_the_jobs_in_the_store_are_told_by_status(tmp_path: Path) -> None:
    often = replace(QUICKLY, counting=0.02)

    def told() -> dict[str, float]:
        now = counted()
        statuses = ("IN_QUEUE", "IN_PROGRESS", "COMPLETED", "CANCELLED", "FAILED")
        return {status: now.value("sdbento_jobs", status=status) for status in statuses}

    async with serving(tmp_path, intervals=often) as server:
        running = [await server.submit(f"slow {i}") for i in range(4)]
        await server.runs("slow 3")
        await server.jobs.cancel(await server.submit("never"))
        await server.submit("later")
        await server.submit(input={"prompt": "x", "width": 513})
        expected = {"IN_QUEUE": 1, "IN_PROGRESS": 4, "COMPLETED": 0, "CANCELLED": 1, "FAILED": 1}
        await until(lambda: told() == expected)
        server.app.gate.set()
        await server.ended(running[0])
        expected = {"IN_QUEUE": 0, "IN_PROGRESS": 0, "COMPLETED": 5, "CANCELLED": 1, "FAILED": 1}
        await until(lambda: told() == expected)
