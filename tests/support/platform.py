"""RunPod's job platform on loopback, as the SDK speaks with it, and worker processes that serve it.

It hands out jobs, hears their results, streams and pings, stops jobs, and can lose a post. Of every
job it keeps all that was posted, so that a result that comes twice or too late is seen. It is a
bucket as well: what is PUT under /bucket can be read again.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from aiohttp import web

from tests.support.server import ROOT, START_LIMIT

T = TypeVar("T")

HOLD = 1.0  # seconds that an empty poll is held open
KEY = "rpa_test"
Loss = Literal["500", "drop"]
State = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED"]


@dataclass
class PlatformJob:
    """A job and everything that workers posted about it."""

    id: str
    input: Any
    state: State = "IN_QUEUE"
    takers: list[str] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)  # that were accepted
    refused: list[dict[str, Any]] = field(default_factory=list)  # of jobs that had ended already
    lost: list[dict[str, Any]] = field(default_factory=list)
    stream: list[dict[str, Any]] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)  # what becomes of the next posts
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def output(self) -> Any:
        assert self.state == "COMPLETED", (self.state, str(self.results)[:500])
        return self.results[0]["output"]

    @property
    def error(self) -> str:
        assert self.state == "FAILED", (self.state, str(self.results)[:200])
        assert "output" not in self.results[0]
        return str(self.results[0]["error"])

    def wait(self, seconds: float = 60.0) -> PlatformJob:
        assert self.ended.wait(seconds), f"job {self.id} is still {self.state}"
        return self


class Platform:
    """The server, on a thread of its own. Its public methods may be called from any thread."""

    def __init__(self) -> None:
        self.jobs: dict[str, PlatformJob] = {}
        self.pings: list[dict[str, str]] = []
        self.polls: set[str] = set()  # workers whose request for jobs is open
        self.bucket: dict[str, bytes] = {}
        self._queues: dict[str, list[PlatformJob]] = {}  # one an endpoint
        self._stops: dict[str, list[str]] = {}  # by worker
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._news = asyncio.Condition()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()
        self.port = self._call(self._serve())
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(
        self, endpoint: str, given: Any, *, sync: bool = False, lose: Loss | None = None
    ) -> PlatformJob:
        """Queue a job; `lose` says how its first result is lost."""
        job = PlatformJob(f"{'sync-' if sync else ''}job-{next(self._numbers)}", given)
        job.losses = [lose] if lose else []

        async def queue() -> None:
            async with self._news:
                self.jobs[job.id] = job
                self._queues.setdefault(endpoint, []).append(job)
                self._news.notify_all()

        self._call(queue())
        return job

    def cancel(self, job: PlatformJob) -> None:
        async def cancel() -> None:
            async with self._news:
                if job.state == "IN_PROGRESS":
                    self._stops.setdefault(job.takers[-1], []).append(job.id)
                for queue in self._queues.values():
                    if job in queue:
                        queue.remove(job)
                self._end(job, "CANCELLED")
                self._news.notify_all()

        self._call(cancel())

    def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up, "what was waited for did not come"
            time.sleep(0.01)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    # From here on, everything runs on the loop.

    async def _serve(self) -> int:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        routes = app.router
        routes.add_get("/v2/{endpoint}/job-take/{worker}", self._take)
        routes.add_get("/v2/{endpoint}/job-take-batch/{worker}", self._take)
        routes.add_get("/v2/{endpoint}/job-stop/{worker}", self._stop)
        routes.add_get("/v2/{endpoint}/ping/{worker}", self._ping)
        routes.add_post("/v2/{endpoint}/job-done/{worker}/{job}", self._done)
        routes.add_post("/v2/{endpoint}/job-stream/{worker}/{job}", self._stream)
        routes.add_put("/bucket/{key:.+}", self._put)
        routes.add_get("/bucket/{key:.+}", self._get)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def _close(self) -> None:
        """Stop the server, and the polls left open by workers that died."""
        await self._runner.cleanup()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _hold(self, request: web.Request, ready: Callable[[], bool]) -> bool:
        """Wait until `ready`, for as long as a poll is held and its client is there."""
        async with self._news:
            try:
                async with asyncio.timeout(HOLD):
                    await self._news.wait_for(ready)
            except TimeoutError:
                return False
        return request.transport is not None and not request.transport.is_closing()

    async def _take(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == KEY
        worker, queue = request.match_info["worker"], self._queue(request)
        self.polls.add(worker)
        try:
            if not await self._hold(request, lambda: bool(queue)):
                return web.Response(status=204)
        finally:
            self.polls.discard(worker)
        batch = int(request.query.get("batch_size", 0))
        taken = [queue.pop(0) for _ in range(min(len(queue), batch or 1))]
        for job in taken:
            job.state = "IN_PROGRESS"
            job.takers.append(worker)
        answer = [{"id": job.id, "input": job.input} for job in taken]
        if not answer:
            return web.Response(status=204)
        return web.json_response(answer if batch else answer[0])

    def _queue(self, request: web.Request) -> list[PlatformJob]:
        return self._queues.setdefault(request.match_info["endpoint"], [])

    async def _stop(self, request: web.Request) -> web.Response:
        stops = self._stops.setdefault(request.match_info["worker"], [])
        if not await self._hold(request, lambda: bool(stops)):
            return web.Response(status=204)
        answer = {"jobsToStop": list(stops)}
        stops.clear()
        return web.json_response(answer)

    async def _ping(self, request: web.Request) -> web.Response:
        self.pings.append({"worker": request.match_info["worker"], **request.query})
        return web.Response()

    async def _done(self, request: web.Request) -> web.Response:
        job = self.jobs[request.match_info["job"]]
        body = json.loads(await request.text())
        assert request.headers["X-Request-ID"] == job.id
        if job.losses:
            job.lost.append(body)
            if job.losses.pop(0) == "drop":
                assert request.transport is not None
                request.transport.abort()
            return web.Response(status=500)
        if job.state != "IN_PROGRESS":
            job.refused.append(body)
            return web.Response(status=400)
        job.results.append(body)
        self._end(job, "FAILED" if "error" in body else "COMPLETED")
        return web.Response()

    def _end(self, job: PlatformJob, state: State) -> None:
        job.state = state
        job.ended.set()

    async def _stream(self, request: web.Request) -> web.Response:
        job = self.jobs[request.match_info["job"]]
        if job.state != "IN_PROGRESS":  # it was cancelled while this was on its way
            return web.Response(status=400)
        job.stream.append(json.loads(await request.text())["output"])
        return web.Response()

    async def _put(self, request: web.Request) -> web.Response:
        if "nobody" in request.headers.get("Authorization", "nobody"):
            return web.Response(status=403)
        self.bucket[request.match_info["key"]] = await request.read()
        return web.Response()

    async def _get(self, request: web.Request) -> web.Response:
        assert "X-Amz-Signature" in request.query
        return web.Response(body=self.bucket[request.match_info["key"]])


class WorkerProcess:
    """A worker for `endpoint`, of the same name, with the SDK's own loop in a real process."""

    def __init__(self, process: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
        self.process = process
        self.endpoint = endpoint
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_it_polls(self, platform: Platform) -> None:
        give_up = time.monotonic() + START_LIMIT
        while self.endpoint not in platform.polls:
            if self.process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the worker takes no jobs:\n{self.log[-4000:]}")
            time.sleep(0.05)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def working(
    platform: Platform, endpoint: str, folder: Path, **variables: str
) -> Iterator[WorkerProcess]:
    """Start a worker with `variables` set; at the end it is gone."""
    base = f"{platform.url}/v2/{endpoint}"
    environment = os.environ | {
        "RUNPOD_POD_ID": endpoint,
        "RUNPOD_AI_API_KEY": KEY,
        "RUNPOD_ENDPOINT_ID": endpoint,
        "RUNPOD_PING_INTERVAL": "1000",
        "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=SIM",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=SIM",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=SIM",
        "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=SIM",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",  # they reach for a public DNS
        "RUNPOD_SKIP_GPU_CHECK": "true",
        "NO_PROXY": "127.0.0.1",
        "SD_MODEL": "shapes",
        **variables,
    }
    log = folder / f"{endpoint}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdbento", "worker"],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield WorkerProcess(process, endpoint, log)
    finally:
        with suppress(ProcessLookupError):  # the SDK pings from a process of its own
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=15)


def decoded(image: str) -> bytes:
    return base64.b64decode(image, validate=True)
