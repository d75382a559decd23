"""A job service on a fake App, which answers when a test lets it."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from sdbento.app import App
from sdbento.engine.handle import Stepped
from sdbento.jobs.dispatcher import Intervals
from sdbento.jobs.formats.a1111 import Call
from sdbento.jobs.results import Results
from sdbento.jobs.runpod_format import new_job
from sdbento.jobs.service import Jobs
from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.store.room import Limits
from sdbento.jobs.table import Job
from sdbento.jobs.webhooks import Webhooks
from sdbento.request.events import Done, Event, Queued
from sdbento.request.schema import GenerateRequest, GenerateResponse, Timings
from sdbento.settings import Settings

SETTINGS = Settings(max_batch_size=2, allow_private_urls=True)
QUICKLY = Intervals(expiry=0.05, tidying=0.05, grace=0.2, overloaded=0.02, key_gone=0.05)
SOON = 10.0  # seconds, more than anything here takes


class FakeApp:
    """Answers at once, "slow" prompts only when `gate` is set; fails as the test sets it."""

    def __init__(self) -> None:
        self.alive = self.ready = True
        self.num_devices = 1
        self.broken: list[str] = []
        self.models = frozenset[str]()
        self.gate = asyncio.Event()
        self.begun: list[GenerateRequest] = []
        self.seconds: list[float | None] = []  # that these may run for
        self.cut_short: list[str] = []
        self.failures: dict[str, list[Exception]] = {}
        self.num_running = self.peak = 0

    def seconds_until_end(self, owner: str | None) -> float:
        return 3.0

    def resident_models(self) -> frozenset[str]:
        return self.models

    def report_broken(self, reason: str) -> None:
        self.broken.append(reason)

    async def answer(self, call: Call) -> Any:
        """A call of AUTOMATIC1111's API, answered with what it is."""
        if failures := self.failures.get(call.path):
            raise failures.pop(0)
        if call.payload.get("prompt") == "slow":
            await self.gate.wait()
        images = [b64encode(str(call.payload.get("seed")).encode()).decode()]
        return {"images": images, "parameters": {}, "info": f"{call.method} {call.path}"}

    async def stream(
        self, request: GenerateRequest, seconds: float | None = None
    ) -> AsyncGenerator[Event, None]:
        self.begun.append(request)
        self.seconds.append(seconds)
        self.num_running += 1
        self.peak = max(self.peak, self.num_running)
        done = False
        try:
            yield Queued(0)
            for step in (1, 2):
                yield Stepped(image=0, step=step, num_steps=2, eta=0.0)
            if request.prompt.startswith("slow"):
                await self.gate.wait()
            if failures := self.failures.get(request.prompt):
                done = True
                raise failures.pop(0)
            yield Done(response_to(request))
            done = True
        finally:
            self.num_running -= 1
            if not done and not self.gate.is_set():
                self.cut_short.append(request.prompt)


def response_to(request: GenerateRequest) -> GenerateResponse:
    image = b64encode(f"{request.prompt} {request.seed}".encode()).decode()
    return GenerateResponse(
        images=[image],
        seeds=[request.seed or 0],
        infotexts=["x"],
        model="fake",
        parameters={},
        timings=Timings(queued=0, denoising=0, decoding=0, total=0),
    )


class Server:
    """A running job service, with helpers for tests."""

    def __init__(self, app: FakeApp, store: JobStore, jobs: Jobs) -> None:
        self.app, self.store, self.jobs = app, store, jobs

    async def submit(self, prompt: str = "quick", *, sync: bool = False, **around: Any) -> str:
        body = {"input": {"prompt": prompt}, **around}
        new = new_job(json.dumps(body).encode(), SETTINGS, sync=sync)
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
        """Wait until the App has started the requests with all these prompts."""
        await until(lambda: {request.prompt for request in self.app.begun} >= set(prompts))


async def until(condition: Any) -> None:
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(
    folder: Path,
    app: FakeApp | None = None,
    limits: Limits | None = None,
    intervals: Intervals = QUICKLY,
    settings: Settings = SETTINGS,
    url: str | None = None,
    results: Results | None = None,
) -> AsyncIterator[Server]:
    app = app or FakeApp()
    store = JobStore(folder, url, results=results, limits=limits)
    webhooks = Webhooks(store, settings, pauses=(0.05,))
    jobs = Jobs(
        cast(App, app),
        store,
        settings,
        answer_call=app.answer,
        intervals=intervals,
        webhooks=webhooks,
    )
    await jobs.start()
    try:
        yield Server(app, store, jobs)
    finally:
        await jobs.stop()
