"""The worker for RunPod's queue: a job's input is a request, its output the images.

    SDK's loop -> Worker.handle -> App.generate or App.stream -> Delivery -> the SDK posts it

The handler is a coroutine that returns the output and, if the job asks for a stream, posts the
events itself. The SDK's generator handlers do not fit: they make a list of every output, with the
images in a list inside it. Knows nothing of what is below App.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import runpod.serverless
from runpod.serverless.modules.rp_logger import LOG_LEVELS, RunPodLogger
from runpod.serverless.modules.worker_state import IS_LOCAL_TEST

from sdbento.doors.runpod.a1111_calls import answer, routes_on
from sdbento.doors.runpod.loop import DrainingScaler
from sdbento.doors.runpod.stream import EventPoster
from sdbento.doors.runpod.volume import use_volume
from sdbento.doors.runpod.wire import WireJob
from sdbento.environment import load_settings
from sdbento.errors import OK, MalformedRequest, classify, is_sick, unexplained
from sdbento.jobs.delivery.deliver import Delivery, Result
from sdbento.jobs.delivery.s3_config import s3_config_of
from sdbento.jobs.formats.a1111 import AnswerCall, Call
from sdbento.jobs.formats.inputs import read_input, run_input
from sdbento.jobs.formats.native import JobInput
from sdbento.jobs.progress import Message
from sdbento.jobs.runpod_format import one_line
from sdbento.metrics.definitions import route
from sdbento.metrics.requests import counting
from sdbento.process.heavy_imports import without_collector
from sdbento.process.replacement import end_process
from sdbento.request.schema import GenerateRequest
from sdbento.settings import Settings, SettingsError
from sdbento.telemetry.job import running_job
from sdbento.telemetry.log_format import formatter, use_everywhere

if TYPE_CHECKING:
    from sdbento.app import App

log = logging.getLogger(__name__)

ROUTE = "worker"  # as metrics have it
FITNESS_REQUEST = {
    "prompt": "a red circle",
    "width": 128,
    "height": 128,
    "num_inference_steps": 2,
}


def main() -> int:
    """As `run`, without the command line. A bad setting is reported in one line."""
    try:
        return run(load_settings())
    except SettingsError as error:
        print(f"sdbento: {error}", file=sys.stderr)
        return 1


def run(settings: Settings) -> int:
    """Take jobs until SIGTERM, then finish those under way. Returns the exit status.

    Must be called before huggingface_hub is imported. Raises SettingsError.
    """
    # Until the SDK's loop sets its own handler. Without one a container's first process, which is
    # process 1, would ignore SIGTERM.
    signal.signal(signal.SIGTERM, end_at_once)
    settings = use_volume(settings).model_copy(update={"prefer_cache": True})
    configure_logging(settings)
    delivery = Delivery(settings, limited=True)
    with without_collector():  # imports huggingface_hub, so not before `use_volume`
        from sdbento.app import App

    app = App(settings, on_broken=end_process)
    num_jobs = concurrency(settings, app.num_devices)
    worker = Worker(app, delivery, partial(answer, routes_on(app)))
    app.start()
    runpod.serverless.register_fitness_check(worker.check_fitness)
    DrainingScaler.install(settings.runpod_drain_seconds)
    config = {"handler": worker.handle, "concurrency_modifier": lambda _: num_jobs}
    try:
        runpod.serverless.start(config)
    finally:
        app.close()
    return 0


def end_at_once(*_: object) -> None:
    """End the process while it starts: there is no job to lose yet.

    Not by an exception: it would interrupt asyncio and others halfway through their set-up, and
    their complaints ("Exception ignored in ...") would look like a crash in the log.
    """
    for child in multiprocessing.active_children():  # the SDK's one, which sends the pings
        child.kill()
    os._exit(0)


def has_queue() -> bool:
    """Whether there are jobs to take: RunPod's, or one in the file that the SDK reads locally."""
    return not IS_LOCAL_TEST or Path("test_input.json").is_file()


def concurrency(settings: Settings, num_devices: int = 1) -> int:
    """How many jobs to run at once. Constant: the SDK changes it only when no job runs."""
    prefetch = min(settings.runpod_prefetch, settings.max_queue_size)
    return num_devices * settings.max_batch_size + prefetch


def configure_logging(settings: Settings) -> None:
    logging.basicConfig(force=True)
    use_everywhere(formatter(settings.log_format))
    logging.getLogger("sdbento").setLevel(settings.log_level)
    sdk = RunPodLogger()
    if LOG_LEVELS.index(sdk.level) in range(1, LOG_LEVELS.index("INFO")):
        sdk.level = "INFO"  # below that it prints whole outputs, base64 and all


def input_of(job: WireJob) -> JobInput | Call:
    """Validate the job's input. Blocking, as it may carry images. Raises SDBentoError."""
    given = job.get("input")
    if not isinstance(given, dict):
        raise MalformedRequest("input must be a JSON object")
    return read_input(given, s3_config_of(job.get("s3Config")))


class Worker:
    """Runs jobs of the queue on the App."""

    def __init__(self, app: App, delivery: Delivery, answer_call: AnswerCall) -> None:
        self._app = app
        self._answer_call = answer_call
        self._delivery = delivery
        route.expect(ROUTE)

    async def check_fitness(self) -> None:
        """Load the model and make a small image. Raises what the SDK reports as unfit."""
        await self._app.generate(GenerateRequest.model_validate(FITNESS_REQUEST))

    async def handle(self, job: WireJob) -> Any:
        """The job's output, or {"error": one line}. If this is cancelled the work stops."""
        with counting(ROUTE) as request:
            try:
                with self._told(job):
                    output = await self._make(job)
            except asyncio.CancelledError:
                request.cancel("cancel")
                raise
            except Exception as exc:
                request.end(classify(exc).outcome)
                return self._failure(job, exc)
            request.end(OK)
            return output

    def _told(self, job: WireJob) -> AbstractContextManager[None]:
        """Have a line of the log about the job."""
        log_prompts = self._app.settings.log_prompts
        return running_job(str(job["id"]), None, None, log_prompts=log_prompts)

    async def _make(self, job: WireJob) -> Any:
        given = await asyncio.to_thread(input_of, job)
        if isinstance(given, JobInput) and given.flags.stream:
            return await self._make_with_stream(job, given)
        return await self._deliver(job, await self._run(given))

    async def _make_with_stream(self, job: WireJob, given: JobInput) -> Any:
        async with EventPoster(str(job["id"])) as poster:
            result = await self._run(given, poster.push)
            output = await self._deliver(job, result)
            await poster.finish(output)
            return output

    async def _run(
        self, given: JobInput | Call, push: Callable[[Message], None] | None = None
    ) -> Result:
        """A job may set any `timeout`, as with /run: the platform ends it at its executionTimeout,
        of which a worker is not told."""
        seconds = None if isinstance(given, Call) else given.request.timeout
        return await run_input(self._app, given, self._answer_call, push, seconds)

    async def _deliver(self, job: WireJob, result: Result) -> Any:
        return await self._delivery.deliver(str(job["id"]), result)

    def _failure(self, job: WireJob, exc: Exception) -> dict[str, Any]:
        """The output of a job that failed; after a device failure no more jobs are taken."""
        error = classify(exc)
        if error.status >= 500:
            reason = unexplained(exc)
            log.error("job %s failed: %s", job.get("id"), error.message, exc_info=reason)
        output: dict[str, Any] = {"error": one_line(error)}
        if is_sick(error) or not self._app.alive:
            output["refresh_worker"] = True  # the SDK asks the platform to stop this worker
            if DrainingScaler.current is not None:
                DrainingScaler.current.drain()  # the device would fail every later job as well
        return output
