"""The RunPod queue worker: a job's input is a request of every other door, its output the images.

    SDK's loop -> Worker.handle -> App.generate or App.stream -> Delivery -> the SDK posts it

The handler is a coroutine: it returns what the client reads, and posts the events of a job that
asked for a stream itself. (The SDK's generator handlers serve streams only: they would wrap every
output in one more list and cannot return anything but a list.) Knows nothing of what is below App.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import runpod.serverless
from runpod.serverless.modules.rp_logger import LOG_LEVELS, RunPodLogger
from runpod.serverless.modules.worker_state import IS_LOCAL_TEST

from sdbento.doors.runpod.delivery import Delivery, Output, Wish
from sdbento.doors.runpod.loop import DrainingScaler
from sdbento.doors.runpod.stream import JobStream
from sdbento.doors.runpod.volume import use_volume
from sdbento.errors import MalformedRequest, classify, is_sick, unexplained
from sdbento.heavy_imports import without_collector
from sdbento.jobs import format as job_format
from sdbento.jobs.format import Flags
from sdbento.request.schema import GenerateRequest, GenerateResponse
from sdbento.settings import Settings, SettingsError

if TYPE_CHECKING:
    from sdbento.app import App

log = logging.getLogger(__name__)

TINY = {"prompt": "a red circle", "width": 128, "height": 128, "num_inference_steps": 2}

Job = dict[str, Any]


def main() -> int:
    """As `run`, for those without the command line; a bad setting is one line."""
    try:
        return run(Settings.load())
    except SettingsError as error:
        print(f"sdbento: {error}", file=sys.stderr)
        return 1


def run(settings: Settings) -> int:
    """Take jobs until SIGTERM, then finish those under way; returns the exit status.

    Must be called before huggingface_hub is imported. Raises SettingsError.
    """
    # The SDK's loop replaces it. A container's first process hears only what it asks for.
    signal.signal(signal.SIGTERM, end_at_once)
    settings = use_volume(settings).model_copy(update={"prefer_cache": True})
    configure_logging(settings)
    delivery = Delivery(settings)
    with without_collector():  # not before: it imports huggingface_hub
        from sdbento.app import App

    num_jobs = concurrency(settings)
    app = App(settings)
    worker = Worker(app, delivery, num_jobs)
    app.start()
    runpod.serverless.register_fitness_check(worker.makes_a_picture)
    DrainingScaler.install(settings.runpod_drain_seconds)
    config = {"handler": worker.handle, "concurrency_modifier": lambda _: num_jobs}
    try:
        runpod.serverless.start(config)
    finally:
        app.close()
    return 0


def end_at_once(*_: object) -> None:
    """Before the loop runs there is no job to lose. An exception would meet half-made objects,
    asyncio's among them, whose complaints look like a crash in the log."""
    for child in multiprocessing.active_children():  # the SDK pings from one
        child.kill()
    os._exit(0)


def has_queue() -> bool:
    """Whether there are jobs to take: RunPod's, or the one in the file that the SDK reads else."""
    return not IS_LOCAL_TEST or Path("test_input.json").is_file()


def concurrency(settings: Settings) -> int:
    """Jobs to have at once: constant, for the SDK waits for an empty worker to change it."""
    return settings.max_batch_size + min(settings.runpod_prefetch, settings.max_queue_size)


def configure_logging(settings: Settings) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("sdbento").setLevel(settings.log_level)
    sdk = RunPodLogger()
    if LOG_LEVELS.index(sdk.level) in range(1, LOG_LEVELS.index("INFO")):
        sdk.level = "INFO"  # below that it prints whole outputs, base64 and all


def read(job: Job) -> tuple[Flags, GenerateRequest]:
    """The job's input, checked. Blocking: it may carry pictures. Raises errors of the tree."""
    given = job.get("input")
    if not isinstance(given, dict):
        raise MalformedRequest("input must be a JSON object")
    asked = job_format.read(given)
    return asked.flags, asked.request


class Worker:
    """Answers jobs, `num_jobs` at once. One object for the life of the process."""

    def __init__(self, app: App, delivery: Delivery, num_jobs: int) -> None:
        self._app = app
        self._delivery = delivery
        # Not asyncio's own: a bucket that hangs would keep them from everything else.
        self._deliverers = ThreadPoolExecutor(num_jobs, thread_name_prefix="sdbento-delivery")

    async def makes_a_picture(self) -> None:
        """Fitness check: the model loads and draws, or the worker says why it is unfit."""
        await self._app.generate(GenerateRequest.model_validate(TINY))

    async def handle(self, job: Job) -> Output:
        """The job's output, or {"error": one line}; when cancelled the work stops."""
        try:
            flags, request = await asyncio.to_thread(read, job)
            if flags.stream:
                return await self._answer_with_stream(job, flags, request)
            return await self._deliver(job, flags, await self._app.generate(request), request)
        except Exception as exc:
            return self._failure(job, exc)

    async def _answer_with_stream(self, job: Job, flags: Flags, request: GenerateRequest) -> Output:
        async with JobStream(job) as stream, aclosing(self._app.stream(request)) as events:
            async for event in events:
                if event["event"] == "done":
                    response: GenerateResponse = event["response"]
                else:
                    stream.push(event)
            output = await self._deliver(job, flags, response, request)
            await stream.finish(output)
            return output

    async def _deliver(
        self, job: Job, flags: Flags, response: GenerateResponse, request: GenerateRequest
    ) -> Output:
        wish = Wish(flags.shape, flags.allow_jpeg, request.output_format)
        return await asyncio.get_running_loop().run_in_executor(
            self._deliverers, self._delivery.deliver, str(job["id"]), response, wish
        )

    def _failure(self, job: Job, exc: Exception) -> dict[str, Any]:
        error = classify(exc)
        if error.status >= 500:
            reason = unexplained(exc)
            log.error("job %s failed: %s", job.get("id"), error.message, exc_info=reason)
        output: dict[str, Any] = {"error": job_format.one_line(error)}
        if is_sick(error):
            output["refresh_worker"] = True  # the SDK asks the platform to stop this worker
            if DrainingScaler.current is not None:
                DrainingScaler.current.drain()  # no more jobs for a device that fails them all
        return output
