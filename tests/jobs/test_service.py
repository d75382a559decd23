"""Jobs on a fake App, which draws when it is told to; a webhook's host is a thread on loopback."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy.exc import OperationalError

from sdbento.app import App
from sdbento.errors import (
    DeadlineExceeded,
    GenerationFailed,
    InvalidParameter,
    MalformedRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from sdbento.jobs.format import WEEK, accept
from sdbento.jobs.progress import MAX_EVENTS, MAX_JOBS, Progress, ProgressOfAll
from sdbento.jobs.service import Jobs, Pace
from sdbento.jobs.store import JobStore, Limits
from sdbento.jobs.table import Job
from sdbento.jobs.webhooks import Webhooks
from sdbento.request.schema import GenerateRequest, GenerateResponse, Timings
from sdbento.settings import Settings
from tests.support.listener import Listener

SETTINGS = Settings(max_batch_size=2, allow_private_urls=True)
QUICKLY = Pace(tick=0.05, tidying=0.05, grace=0.2, overloaded=0.02)
SOON = 10.0  # seconds that nothing here takes


class FakeApp:
    """Draws at once, but "slow" prompts only when `gate` is set; fails as it is told to."""

    def __init__(self) -> None:
        self.engine = SimpleNamespace(alive=True, seconds_per_request=3.0)
        self.ready = True
        self.gate = asyncio.Event()
        self.begun: list[GenerateRequest] = []
        self.cut_short: list[str] = []
        self.failures: dict[str, list[Exception]] = {}
        self.num_running = self.peak = 0

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[dict[str, Any], None]:
        self.begun.append(request)
        self.num_running += 1
        self.peak = max(self.peak, self.num_running)
        done = False
        try:
            yield {"event": "queued", "position": 0, "eta": None}
            for step in (1, 2):
                yield {"event": "step", "image": 0, "step": step, "num_steps": 2, "eta": 0.0}
            if request.prompt.startswith("slow"):
                await self.gate.wait()
            if failures := self.failures.get(request.prompt):
                done = True
                raise failures.pop(0)
            yield {"event": "done", "response": drawn(request)}
            done = True
        finally:
            self.num_running -= 1
            if not done and not self.gate.is_set():
                self.cut_short.append(request.prompt)


def drawn(request: GenerateRequest) -> GenerateResponse:
    picture = b64encode(f"{request.prompt} {request.seed}".encode()).decode()
    return GenerateResponse(
        images=[picture],
        seeds=[request.seed or 0],
        model="fake",
        parameters={},
        timings=Timings(queued=0, denoising=0, decoding=0, total=0),
    )


class Server:
    """Jobs that run, with what tests ask them."""

    def __init__(self, app: FakeApp, store: JobStore, jobs: Jobs) -> None:
        self.app, self.store, self.jobs = app, store, jobs

    async def submit(self, prompt: str = "quick", *, sync: bool = False, **around: Any) -> str:
        body = {"input": {"prompt": prompt}, **around}
        new = accept(json.dumps(body).encode(), SETTINGS, sync=sync)
        await self.jobs.submit(new)
        return new.id

    async def ended(self, job_id: str) -> Job:
        job = await self.jobs.wait(job_id, SOON)
        assert not job.unfinished
        return job

    async def answer(self, job_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(await self.jobs.describe(await self.jobs.get(job_id)))
        return answer

    async def runs(self, *prompts: str) -> None:
        """Wait until the App has begun all these."""
        await until(lambda: {request.prompt for request in self.app.begun} >= set(prompts))


async def until(condition: Any) -> None:
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(
    folder: Path, app: FakeApp | None = None, limits: Limits | None = None, pace: Pace = QUICKLY
) -> AsyncIterator[Server]:
    app = app or FakeApp()
    store = JobStore(folder, limits=limits)
    webhooks = Webhooks(store, SETTINGS, pause=0.05)
    jobs = Jobs(cast(App, app), store, SETTINGS, pace=pace, webhooks=webhooks)
    await jobs.start()
    try:
        yield Server(app, store, jobs)
    finally:
        await jobs.stop()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(tmp_path) as server:
        yield server


# What becomes of a job


async def test_a_job_is_drawn(server: Server) -> None:
    job_id = await server.submit()
    assert (await server.ended(job_id)).status == "COMPLETED"
    answer = await server.answer(job_id)
    seed = server.app.begun[0].seed
    assert answer["output"] == [b64encode(f"quick {seed}".encode()).decode()]
    assert (answer["id"], answer["status"]) == (job_id, "COMPLETED")
    assert answer["delayTime"] >= 0 <= answer["executionTime"]
    assert "error" not in answer


async def test_a_job_may_ask_for_all_that_is_known(server: Server) -> None:
    job_id = await server.submit(input={"prompt": "x", "seed": 3, "return": "full"})
    await server.ended(job_id)
    output = (await server.answer(job_id))["output"]
    assert set(output) == set(GenerateResponse.model_fields)
    assert output["seeds"] == [3]


async def test_a_bad_input_is_accepted_and_fails(server: Server) -> None:
    job_id = await server.submit(input={"prompt": "x", "width": 513})
    answer = await server.answer(job_id)
    assert answer["status"] == "FAILED"
    assert "multiple of 8" in answer["error"] and "\n" not in answer["error"]
    assert server.app.begun == []


async def test_a_job_that_cannot_be_drawn_fails_with_one_line(server: Server) -> None:
    server.app.failures["x"] = [GenerationFailed("the sampler\n diverged")]
    job = await server.ended(await server.submit("x"))
    assert (job.status, job.error) == ("FAILED", "the sampler diverged")
    server.app.failures["y"] = [KeyError("secret")]
    job = await server.ended(await server.submit("y"))
    assert job.error is not None and "secret" not in job.error and "id " in job.error


async def test_no_more_jobs_run_than_the_engine_can_use(server: Server) -> None:
    ids = [await server.submit(f"slow {i}") for i in range(9)]
    await server.runs("slow 3")
    counts = await server.jobs.counts()
    assert (counts.by_status["IN_PROGRESS"], counts.by_status["IN_QUEUE"]) == (4, 5)
    server.app.gate.set()
    for job_id in ids:
        assert (await server.ended(job_id)).status == "COMPLETED"
    assert server.app.peak == 4 == 2 * SETTINGS.max_batch_size
    first = {request.prompt for request in server.app.begun[:4]}
    assert first == {f"slow {i}" for i in range(4)}


async def test_low_priority_comes_last(server: Server) -> None:
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


async def test_too_many_jobs_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=Limits(max_unfinished=1)) as server:
        await server.submit("slow")
        with pytest.raises(Overloaded) as caught:
            await server.submit()
        assert caught.value.retry_after == 3.0


# Stopping


async def test_a_running_job_stops_when_it_is_cancelled(server: Server) -> None:
    job_id = await server.submit("slow")
    await server.runs("slow")
    assert (await server.jobs.cancel(job_id)).status == "CANCELLED"
    await until(lambda: server.app.cut_short == ["slow"])
    assert (await server.answer(job_id))["status"] == "CANCELLED"
    await until(lambda: server.jobs.num_running == 0)


async def test_a_waiting_job_is_cancelled_and_never_begun(server: Server) -> None:
    for i in range(4):
        await server.submit(f"slow {i}")
    job_id = await server.submit("never")
    assert (await server.jobs.cancel(job_id)).status == "CANCELLED"
    server.app.gate.set()
    await server.ended(await server.submit("after"))
    assert "never" not in {request.prompt for request in server.app.begun}


async def test_jobs_that_are_cancelled_at_any_moment_free_their_places(server: Server) -> None:
    for i in range(30):
        job_id = await server.submit("slow")
        await asyncio.sleep(0.0005 * i)
        assert (await server.jobs.cancel(job_id)).status == "CANCELLED"
    await until(lambda: server.jobs.num_running == 0)
    assert (await server.ended(await server.submit())).status == "COMPLETED"


async def test_purging_leaves_running_jobs_alone(server: Server) -> None:
    ids = [await server.submit(f"slow {i}") for i in range(7)]
    await server.runs("slow 3")
    waiting = asyncio.create_task(server.ended(ids[-1]))
    assert await server.jobs.purge() == 3
    assert (await waiting).status == "CANCELLED"
    server.app.gate.set()
    assert (await server.ended(ids[0])).status == "COMPLETED"


async def test_a_job_that_runs_for_too_long_times_out_and_stops(server: Server) -> None:
    new = accept(b'{"input": {"prompt": "slow"}}', SETTINGS, sync=False)
    await server.jobs.submit(type(new)(**(vars(new) | {"execution_timeout": 100})))
    job = await server.ended(new.id)
    assert job.status == "TIMED_OUT"
    assert job.error is not None and "100 ms" in job.error
    assert server.app.cut_short == ["slow"]


async def test_a_job_that_outlives_its_ttl_times_out_and_stops(server: Server) -> None:
    new = accept(b'{"input": {"prompt": "slow"}}', SETTINGS, sync=False)
    await server.jobs.submit(type(new)(**(vars(new) | {"ttl": 300})))
    job = await server.ended(new.id)
    assert (job.status, job.run) == ("TIMED_OUT", 1)
    assert job.error is not None and "its ttl of 300 ms" in job.error
    assert server.app.cut_short == ["slow"]


async def test_a_deadline_of_the_engine_is_a_timeout_too(server: Server) -> None:
    server.app.failures["x"] = [DeadlineExceeded("cannot be done within its timeout")]
    job = await server.ended(await server.submit("x", policy={"executionTimeout": 90_000}))
    assert job.status == "TIMED_OUT"
    assert server.app.begun[0].timeout == 90.0


async def test_a_job_that_waits_for_too_long_times_out(server: Server) -> None:
    for i in range(4):
        await server.submit(f"slow {i}")
    new = accept(b'{"input": {"prompt": "late"}}', SETTINGS, sync=False)
    await server.jobs.submit(type(new)(**(vars(new) | {"ttl": 100})))
    assert (await server.ended(new.id)).status == "TIMED_OUT"


async def test_a_failed_job_can_be_retried_and_no_other(server: Server) -> None:
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


async def test_a_job_that_is_not_there_is_not_found(server: Server) -> None:
    for ask in (server.jobs.get, server.jobs.cancel, server.jobs.retry):
        with pytest.raises(NotFound, match="'abc'"):
            await ask("abc")
    with pytest.raises(NotFound):
        await server.jobs.wait("abc", SOON)


async def test_waiting_ends_in_time(server: Server) -> None:
    job_id = await server.submit("slow")
    job = await server.jobs.wait(job_id, 0.1)
    assert job.status == "IN_PROGRESS"
    assert await server.answer(job_id) == {
        "id": job_id, "status": "IN_PROGRESS", "delayTime": job.delay
    }  # fmt: skip


# Progress


async def test_a_stream_tells_each_event_once_and_ends_with_the_output(server: Server) -> None:
    job_id = await server.submit("slow")
    await server.runs("slow")
    await until(lambda: server.jobs._progress.of(job_id)._events)
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


async def test_a_stream_waits_for_what_happens_next(server: Server) -> None:
    job_id = await server.submit("slow")
    await server.runs("slow")
    told: list[dict[str, Any]] = []
    while len(told) < 3:
        told += (await server.jobs.stream(job_id, SOON))[1]
    waiting = asyncio.create_task(server.jobs.stream(job_id, SOON))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await server.jobs.cancel(job_id)
    job, events = await waiting
    assert (job.status, events) == ("CANCELLED", [])


def test_of_previews_only_the_newest_waits() -> None:
    progress = Progress()
    for step in range(3):
        progress.push({"event": "step", "image": 0, "step": step})
        progress.push({"event": "preview", "image": 0, "step": step})
    kinds = [(event["event"], event["step"]) for event in progress.take()]
    assert kinds == [("step", 0), ("step", 1), ("step", 2), ("preview", 2)]


async def test_a_running_job_is_not_forgotten_for_others_that_are_looked_at(
    server: Server,
) -> None:
    async def steps(request: GenerateRequest) -> AsyncGenerator[dict[str, Any], None]:
        yield {"event": "step", "step": 1}
        await server.app.gate.wait()
        yield {"event": "step", "step": 2}
        yield {"event": "done", "response": drawn(request)}

    server.app.stream = steps  # type: ignore[method-assign]
    job_id = await server.submit()
    assert (await server.jobs.stream(job_id, SOON))[1] == [{"event": "step", "step": 1}]
    for i in range(MAX_JOBS):
        server.jobs._progress.of(str(i))
    server.app.gate.set()
    await server.ended(job_id)
    events = (await server.jobs.stream(job_id, SOON))[1]
    assert [event["event"] for event in events] == ["step", "done"]


def test_progress_is_bounded() -> None:
    every = ProgressOfAll()
    for i in range(MAX_JOBS + 5):
        every.of(str(i)).push({"event": "queued"})
    assert every.of("0").take() == []
    assert every.of(str(MAX_JOBS)).take() != []
    for _ in range(MAX_EVENTS + 5):
        every.of("x").push({"event": "step"})
    assert len(every.of("x").take()) == MAX_EVENTS


# A new start


async def test_what_was_running_and_waiting_is_done_after_a_new_start(tmp_path: Path) -> None:
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
        assert sorted(again) == [f"slow {i}" for i in range(6)]  # each once, and the done one not
        assert {prompt: again[prompt] for prompt in first if prompt in again} == {
            prompt: seed for prompt, seed in first.items() if prompt != "quick"
        }


async def test_running_jobs_may_finish_when_the_server_stops(tmp_path: Path) -> None:
    async with serving(tmp_path, pace=Pace(tick=0.05, grace=SOON)) as server:
        job_id = await server.submit("slow")
        await server.runs("slow")
        asyncio.get_running_loop().call_later(0.1, server.app.gate.set)
    store = JobStore(tmp_path)
    job = store.get(job_id)
    assert job is not None and job.status == "COMPLETED"
    store.close()


async def test_a_job_that_the_closing_engine_drops_is_not_failed(tmp_path: Path) -> None:
    async with serving(tmp_path, pace=Pace(tick=0.05, grace=SOON)) as server:
        server.app.failures["slow"] = [Unavailable("the server stopped")]
        job_id = await server.submit("slow")
        await server.runs("slow")
        asyncio.get_running_loop().call_later(0.1, server.app.gate.set)
    store = JobStore(tmp_path)
    job = store.get(job_id)
    assert job is not None and job.status == "IN_QUEUE"
    store.close()


async def test_a_database_that_is_away_for_a_while_loses_no_result(
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
    refusals["get"] = 1  # met by its run: this test asks a moment later
    await until(lambda: not refusals["get"] and not refusals["complete"])
    assert (await server.ended(job_id)).status == "COMPLETED"


async def test_jobs_that_were_begun_without_an_answer_are_begun_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = server.store.claim
    lost: list[Job] = []

    def answer_lost(limit: int) -> list[Job]:
        claimed = claim(limit)
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


async def test_who_waits_for_a_job_is_answered_when_the_server_is_about_to_stop(
    server: Server,
) -> None:
    running = [await server.submit(f"slow {i}") for i in range(4)]
    queued = await server.submit()
    await server.runs(*(f"slow {i}" for i in range(4)))
    waiting = [asyncio.create_task(server.jobs.wait(i, SOON)) for i in (running[0], queued)]
    await server.jobs.stream(running[0], SOON)
    streaming = asyncio.create_task(server.jobs.stream(running[0], SOON))
    await asyncio.sleep(0.05)
    server.jobs.wind_up()
    statuses = [(await asyncio.wait_for(task, 1)).status for task in waiting]
    assert statuses == ["IN_PROGRESS", "IN_QUEUE"]
    assert (await asyncio.wait_for(streaming, 1))[0].status == "IN_PROGRESS"
    await asyncio.wait_for(server.jobs.wait(queued, SOON), 1)
    server.app.gate.set()  # what runs may finish, and nothing is begun in its place
    await until(lambda: server.jobs.num_running == 0)
    assert (await server.jobs.get(running[0])).status == "COMPLETED"
    assert (await server.jobs.get(queued)).status == "IN_QUEUE"


async def test_a_store_that_is_another_servers_now_is_left_to_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock = SimpleNamespace(check=lambda: None, close=lambda: None)
    server.store._locks.append(lock)  # type: ignore[arg-type]
    job_id = await server.submit("slow")
    await server.runs("slow")

    def lost() -> None:
        raise Unavailable("another server has it")

    lock.check = lost
    server.app.gate.set()
    await until(lambda: server.jobs.num_running == 0)
    for ask in (server.jobs.get(job_id), server.jobs.cancel(job_id), server.jobs.counts()):
        with pytest.raises(Unavailable, match="another server has it"):
            await ask
    assert "what became of job" in caplog.text
    lock.check = lambda: None  # and has ended
    await until(lambda: server.store._lost is None)
    assert (await server.ended(job_id)).status == "COMPLETED"


async def test_a_server_that_stops_while_it_begins_jobs_queues_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as server:
        claim, begun = server.store.claim, threading.Event()

        def slowly(limit: int) -> list[Job]:
            claimed = claim(limit)
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


# Webhooks


async def told(server: Server) -> None:
    """Wait until no webhook is left to tell."""
    await until(lambda: not server.store.due_webhooks(1) and not server.jobs._webhooks._posting)


async def test_a_webhook_is_told_what_status_says(server: Server, listener: Listener) -> None:
    job_id = await server.submit(webhook=listener.url)
    await server.ended(job_id)
    await until(lambda: listener.heard)
    assert listener.heard == [await server.answer(job_id)]


async def test_a_webhook_is_tried_three_times(server: Server, listener: Listener) -> None:
    listener.statuses = [500, 302]
    job_id = await server.submit(webhook=listener.url)
    await until(lambda: len(listener.heard) == 3)
    await told(server)
    listener.statuses = [500] * 9
    await server.submit(webhook=listener.url)
    await until(lambda: len(listener.heard) == 6)
    await asyncio.sleep(0.2)
    assert len(listener.heard) == 6
    assert listener.heard[0] == listener.heard[2] == await server.answer(job_id)


async def test_a_webhook_is_not_told_again_because_that_cannot_be_kept(
    server: Server, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, refusals = server.store.note_webhook, [1, 2, 3]

    def sometimes(*args: Any) -> None:
        if refusals:
            refusals.pop()
            raise OperationalError("UPDATE jobs", None, Exception("the disk is full"))
        note(*args)

    monkeypatch.setattr(server.store, "note_webhook", sometimes)
    await server.submit(webhook=listener.url)
    await until(lambda: not refusals)
    await told(server)
    assert len(listener.heard) == 1


async def test_a_webhook_that_was_not_told_is_told_after_a_new_start(
    tmp_path: Path, listener: Listener
) -> None:
    store = JobStore(tmp_path)
    body = {"input": {"prompt": "x"}, "webhook": listener.url}
    new = accept(json.dumps(body).encode(), SETTINGS, sync=False)
    store.add(new)
    (job,) = store.claim(1)
    store.complete(job, b'["picture"]')
    store.close()  # as if it had been killed here
    async with serving(tmp_path) as server:
        await until(lambda: listener.heard)
        assert listener.heard[0]["output"] == ["picture"]
        assert server.app.begun == []


async def test_a_failure_and_a_cancellation_are_told(server: Server, listener: Listener) -> None:
    await server.submit(input={}, webhook=listener.url)
    await until(lambda: len(listener.heard) == 1)
    job_id = await server.submit("slow", webhook=listener.url)
    await server.jobs.cancel(job_id)
    await until(lambda: len(listener.heard) == 2)
    assert [heard["status"] for heard in listener.heard] == ["FAILED", "CANCELLED"]
    assert listener.heard[0]["error"] == "prompt is required"


async def test_results_are_forgotten_after_their_time(server: Server) -> None:
    new = accept(b'{"input": {"prompt": "x"}}', SETTINGS, sync=False)
    await server.jobs.submit(type(new)(**(vars(new) | {"keep": 1})))
    await until(lambda: server.store.get(new.id) is None)
    with pytest.raises(NotFound, match="expired"):
        await server.jobs.get(new.id)


# What is accepted


def accepted(body: str, settings: Settings = SETTINGS, sync: bool = False) -> Any:
    return accept(body.encode(), settings, sync=sync)


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "1", "{}", '{"input": null}', '{"input": []}', '{"input": "x"}',
     '{"prompt": "x"}', "[" * 100_000, '{"input": {"prompt": "\\ud800"}}'],
)  # fmt: skip
def test_a_body_without_an_input_object_is_refused(body: str) -> None:
    with pytest.raises(MalformedRequest):
        accepted(body)


@pytest.mark.parametrize(
    ("around", "param"),
    [
        ('"policy": {"executionTimeout": 4999}', "policy.executionTimeout"),
        (f'"policy": {{"executionTimeout": {WEEK + 1}}}', "policy.executionTimeout"),
        ('"policy": {"ttl": 9999}', "policy.ttl"),
        ('"policy": {"ttl": "soon"}', "policy.ttl"),
        ('"policy": {"lowPriority": "perhaps"}', "policy.lowPriority"),
        ('"policy": 5', "policy"),
        ('"webhook": 5', "webhook"),
        ('"webhook": "ftp://listener.example/"', "webhook"),
        ('"webhook": "https://bob:secret@listener.example/"', "webhook"),
        ('"webhook": "nonsense"', "webhook"),
    ],
)
def test_what_is_around_the_input_is_refused_at_once(around: str, param: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        accepted(f'{{"input": {{"prompt": "x"}}, {around}}}')
    assert caught.value.param == param


def test_a_webhook_must_be_https_unless_private_ones_are_allowed() -> None:
    body = '{"input": {"prompt": "x"}, "webhook": "http://listener.example/"}'
    assert accepted(body).webhook == "http://listener.example/"
    with pytest.raises(InvalidParameter, match="use https"):
        accepted(body, Settings())


def test_runpods_defaults_and_limits_hold() -> None:
    plain = accepted('{"input": {"prompt": "x"}, "s3Config": {}, "webhook": null, "policy": null}')
    assert (plain.ttl, plain.execution_timeout, plain.keep) == (86_400_000, 600_000, 1_800_000)
    assert (plain.low_priority, plain.webhook) == (False, None)
    nulls = '"policy": {"executionTimeout": null, "ttl": null, "lowPriority": null}'
    assert accepted(f'{{"input": {{"prompt": "x"}}, {nulls}}}').ttl == plain.ttl
    policy = '"policy": {"executionTimeout": 5000, "ttl": 10000, "lowPriority": true}'
    job = accepted(f'{{"input": {{"prompt": "x"}}, {policy}}}', sync=True)
    assert (job.execution_timeout, job.ttl, job.low_priority) == (5000, 10_000, True)
    assert (job.id[:5], job.keep) == ("sync-", 60_000)


@pytest.mark.parametrize("seed", ["", ', "seed": null', ', "seed": -1'])
def test_a_seed_is_drawn_once_when_the_job_is_accepted(seed: str) -> None:
    body = f'{{"input": {{"prompt": "x"{seed}}}}}'
    seeds = {json.loads(accepted(body).input)["seed"] for _ in range(5)}
    assert len(seeds) == 5 and min(seeds) >= 0
    assert json.loads(accepted('{"input": {"prompt": "x", "seed": 4}}').input)["seed"] == 4
