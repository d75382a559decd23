"""The RunPod worker: the real SDK's loop in real processes, on the embedded model, on loopback."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from sdbento.doors.runpod.loop import DrainingScaler
from sdbento.doors.runpod.worker import Worker, concurrency, input_of
from sdbento.environment import load_settings
from sdbento.errors import (
    InvalidParameter,
    MalformedRequest,
    Unavailable,
    classify,
)
from sdbento.jobs.delivery.deliver import Delivery
from sdbento.jobs.formats.a1111 import Call
from sdbento.jobs.formats.native import JobInput
from sdbento.request.events import Done, Event
from sdbento.request.schema import GenerateRequest, GenerateResponse
from tests.support.device_errors import SICK, AcceleratorError
from tests.support.job_server import response_to
from tests.support.metrics import counted
from tests.support.platform import Platform, PlatformJob, WorkerProcess, decoded, working
from tests.support.s3 import SECRET, storing

PROMPT = "a large red circle on a blue background"
QUICK: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4, "seed": 7}
LONG: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 150, "num_images": 3}
SAMPLERS = ["DDIM", "Euler", "Euler a", "DPM++ 2M Karras", "UniPC", "Heun"]
LIMIT = 50_000  # bytes of a /run job's result; one image of `shapes` has a quarter of that


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    platform = Platform()
    platform.start()
    yield platform
    platform.stop()


@pytest.fixture(scope="module")
def worker(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    folder = tmp_path_factory.mktemp("worker")
    variables = {"SDBENTO_RUNPOD_MAX_RUN_BYTES": str(LIMIT), "MAX_BATCH_SIZE": "8"}
    with working(platform, "w1", folder, **variables) as process:
        process.wait_until_it_polls(platform)
        yield process


def answered(platform: Platform, given: Any, **options: Any) -> PlatformJob:
    """A job for `worker`, awaited until it ends."""
    return platform.submit("w1", given, **options).wait()


def opened(image: str) -> Image.Image:
    return Image.open(BytesIO(decoded(image)))


def test_the_output_of_a_job_is_a_list_of_base64_images(
    platform: Platform, worker: WorkerProcess
) -> None:
    output = answered(platform, QUICK).output
    assert len(output) == 1
    drawn = opened(output[0])
    assert drawn.size == (128, 128)
    assert json.loads(drawn.info["sdbento"])["seed"] == 7


def test_a_job_may_ask_for_the_full_response(platform: Platform, worker: WorkerProcess) -> None:
    output = answered(platform, {**QUICK, "num_images": 2, "return": "full"}).output
    assert set(output) == set(GenerateResponse.model_fields)
    assert output["seeds"] == [7, 8]
    assert output["model"] == "shapes"
    again = answered(platform, {**output["parameters"], "seed": 8}).output
    # It ran beside another image and now runs alone, which may round one level differently.
    alone, beside = (np.asarray(opened(image), int) for image in (again[0], output["images"][1]))
    assert np.abs(alone - beside).max() <= 1


BAD: list[tuple[Any, list[str]]] = [
    ({}, ["prompt is required"]),
    ("a red circle", ["input must be a JSON object"]),
    ({"prompt": "x", "width": 513}, ["width", "multiple of 8", "513"]),
    ({"prompt": "x", "stepz": 5}, ["stepz", "not a known field"]),
    ({"prompt": "x", "scheduler": "Eulr"}, ["Eulr", "Euler"]),
    ({"prompt": "x", "model": "shape"}, ["shape"]),
    ({"prompt": "x", "return": "all"}, ["return", "'images', 'full' or 'worker-sdxl'", "'all'"]),
    ({"prompt": "x", "stream": "yes"}, ["stream", "boolean", "'yes'"]),
]


def mixed_input(i: int) -> dict[str, Any]:
    side = 192 if i % 5 == 4 else 128
    return {
        "prompt": f"a {['red', 'green', 'blue', 'yellow'][i % 4]} square",
        "scheduler": SAMPLERS[i % len(SAMPLERS)],
        "num_inference_steps": 3 + i % 5,
        "guidance_scale": [1.0, 3.0, 7.5][i % 3],
        "seed": i,
        "width": side,
        "height": side,
    }


def test_40_mixed_jobs_at_once_each_end_once_with_the_right_result(
    platform: Platform, worker: WorkerProcess
) -> None:
    inputs = [mixed_input(i) for i in range(40 - len(BAD))] + [given for given, _ in BAD]
    jobs = [platform.submit("w1", given) for given in inputs]
    for job in jobs:
        job.wait()
    for job, given in zip(jobs, inputs[: -len(BAD)], strict=False):
        assert opened(job.output[0]).size == (given["width"], given["height"])
    for job, (_, words) in zip(jobs[-len(BAD) :], BAD, strict=True):
        assert "\n" not in job.error
        assert "Traceback" not in job.error
        for word in words:
            assert word in job.error
    assert all(len(job.takers) == len(job.results) == 1 for job in jobs)
    assert not any(job.refused for job in jobs)


def test_a_stopped_job_stops_between_two_steps_and_harms_no_other(
    platform: Platform, worker: WorkerProcess
) -> None:
    stopped = [platform.submit("w1", {**LONG, "stream": i == 0}) for i in range(2)]
    beside = platform.submit("w1", QUICK)
    platform.until(lambda: all(job.state == "IN_PROGRESS" for job in stopped))
    platform.until(lambda: len(stopped[0].stream) > 2)
    for job in stopped:
        platform.cancel(job)
    assert beside.wait().output
    platform.until(lambda: worker.log.count("Job stopped.") == 2, seconds=5)
    heard = len(stopped[0].stream)
    assert answered(platform, QUICK).output
    assert len(stopped[0].stream) == heard
    assert stopped[0].stream[-1].get("step", 0) < 150
    assert not any(job.results or job.refused for job in stopped)


def test_a_job_that_is_stopped_at_once_is_not_run(
    platform: Platform, worker: WorkerProcess
) -> None:
    def num_stopped() -> int:
        return worker.log.count("Job stopped.") + worker.log.count("stopped before its turn")

    before = num_stopped()
    jobs = [platform.submit("w1", LONG) for _ in range(5)]
    for job in jobs:
        platform.until(lambda job=job: job.state == "IN_PROGRESS")  # type: ignore[misc]
        platform.cancel(job)
    platform.until(lambda: num_stopped() == before + 5, seconds=5)
    assert not any(job.results or job.refused for job in jobs)


@pytest.mark.parametrize("loss", ["500", "drop"])
def test_a_lost_result_is_posted_again(
    platform: Platform, worker: WorkerProcess, loss: Any
) -> None:
    job = answered(platform, QUICK, lose=loss)
    assert job.lost == job.results
    assert job.takers == ["w1"]
    assert not job.refused


def test_a_stream_reports_the_queue_steps_previews_and_the_end(
    platform: Platform, worker: WorkerProcess
) -> None:
    steps = 30
    job = answered(
        platform, {**QUICK, "num_inference_steps": steps, "preview_every": 5, "stream": True}
    )
    names = [event["event"] for event in job.stream]
    assert names[0] == "queued"
    done = [event["step"] for event in job.stream if event["event"] == "step"]
    assert done == sorted(done) and done[-1] == steps
    preview = next(event for event in job.stream if event["event"] == "preview")
    assert opened(preview["preview"]).format == "JPEG"
    assert names[-1] == "done"
    assert job.stream[-1]["output"] == job.output
    alone = answered(platform, {**QUICK, "num_inference_steps": steps})
    assert opened(job.output[0]).tobytes() == opened(alone.output[0]).tobytes()
    assert not alone.stream


def test_a_stream_that_is_refused_fails_like_any_job(
    platform: Platform, worker: WorkerProcess
) -> None:
    job = answered(platform, {**QUICK, "width": 8, "stream": True})
    assert "width" in job.error
    assert not job.stream


def test_a_result_over_the_limit_is_an_error_that_names_both(
    platform: Platform, worker: WorkerProcess
) -> None:
    large = {**QUICK, "num_images": 6}
    error = answered(platform, large).error
    assert f"the limit is {LIMIT}" in error
    assert "SDBENTO_RUNPOD_MAX_RUN_BYTES" in error
    assert "allow_jpeg" in error
    assert len(answered(platform, large, sync=True).output) == 6  # /runsync allows more
    output = answered(platform, {**large, "allow_jpeg": True, "return": "full"}).output
    assert [opened(image).format for image in output["images"]] == ["JPEG"] * 6
    assert "sent as JPEG" in output["warnings"][-1]


def test_the_platform_is_told_which_jobs_are_running(
    platform: Platform, worker: WorkerProcess
) -> None:
    job = platform.submit("w1", LONG)
    platform.until(lambda: any(job.id in ping.get("job_id", "") for ping in platform.pings))
    platform.cancel(job)


def test_no_image_is_ever_in_the_log(platform: Platform, worker: WorkerProcess) -> None:
    job = answered(platform, QUICK)
    assert job.output[0][:40] not in worker.log
    assert QUICK["prompt"] not in worker.log
    assert f"(request={job.id})" in worker.log  # the line about the job
    assert "DEBUG" not in worker.log


def test_a_large_result_goes_to_the_bucket_and_sigterm_loses_no_job(
    platform: Platform, tmp_path: Path
) -> None:
    bucket = {
        "BUCKET_ENDPOINT_URL": platform.url,
        "BUCKET_ACCESS_KEY_ID": "somebody",
        "BUCKET_SECRET_ACCESS_KEY": "hush",
        "BUCKET_NAME": "bucket",
        "SDBENTO_RUNPOD_MAX_RUN_BYTES": "2000",
        "SDBENTO_RUNPOD_PREFETCH": "6",
    }
    with working(platform, "w2", tmp_path, **bucket) as worker:
        worker.wait_until_it_polls(platform)
        job = platform.submit("w2", QUICK).wait()
        [url] = job.output
        drawn = Image.open(BytesIO(httpx.get(url, trust_env=False).content))
        assert json.loads(drawn.info["sdbento"])["seed"] == 7
        assert "hush" not in worker.log + url

        long = {**QUICK, "num_inference_steps": 40}
        *before, stopped = [platform.submit("w2", given) for given in [*[long] * 4, LONG]]
        platform.until(lambda: all(job.state == "IN_PROGRESS" for job in [*before, stopped]))
        platform.until(lambda: "w2" in platform.polls)
        worker.terminate()
        platform.until(lambda: "draining" in worker.log)
        on_the_open_poll = platform.submit("w2", QUICK)
        for job in [*before, on_the_open_poll]:
            assert len(job.wait().output) == 1
            assert len(job.takers) == len(job.results) == 1
            assert not job.refused
        too_late = platform.submit("w2", QUICK)
        platform.cancel(stopped)
        platform.until(lambda: worker.log.count("Job stopped.") == 1, seconds=5)
        assert worker.process.wait(timeout=30) == 0
        assert too_late.state == "IN_QUEUE"  # another worker can take it


@pytest.mark.long
def test_a_worker_that_is_ended_while_it_starts_takes_no_job(
    platform: Platform, tmp_path: Path
) -> None:
    job = platform.submit("w4", QUICK)
    with working(platform, "w4", tmp_path) as worker:
        platform.until(lambda: "Starting Serverless Worker" in worker.log)
        worker.terminate()
        assert worker.process.wait(timeout=40) == 0
        assert "Traceback" not in worker.log
    assert job.state == "IN_QUEUE"


@pytest.mark.long
def test_a_worker_whose_model_cannot_be_loaded_reports_why_and_takes_no_job(
    platform: Platform, tmp_path: Path
) -> None:
    job = platform.submit("w3", QUICK)
    with working(platform, "w3", tmp_path, SD_MODEL="no-such-model") as worker:
        assert worker.process.wait(timeout=100) == 1
    assert job.state == "IN_QUEUE"
    assert "no-such-model" in worker.log
    [ping] = [ping for ping in platform.pings if ping["worker"] == "w3"]
    assert ping["status"] == "unhealthy"
    assert "no-such-model" in ping["reason"]


# What needs no process.


class FakeApp:
    """Answers every request with `response`, or raises it."""

    def __init__(self, response: GenerateResponse | Exception) -> None:
        self.response = response
        self.settings = load_settings()
        self.alive = True
        self.seconds: list[float | None] = []  # for which requests may run

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        if isinstance(self.response, Exception):
            raise self.response
        return self.response

    async def stream(
        self, request: GenerateRequest, seconds: float | None = None
    ) -> AsyncGenerator[Event, None]:
        self.seconds.append(seconds)
        yield Done(await self.generate(request))


async def no_calls(call: Call) -> Any:
    raise AssertionError(f"{call} was called")


def worker_with(response: GenerateResponse | Exception) -> Worker:
    app: Any = FakeApp(response)
    return Worker(app, Delivery(load_settings(), limited=True), answer_call=no_calls)


@pytest.mark.parametrize(("error", "sick"), SICK)
async def test_only_a_sick_gpu_asks_for_a_fresh_worker(error: Exception, sick: bool) -> None:
    output = await worker_with(classify(error)).handle({"id": "a", "input": {"prompt": "x"}})
    assert isinstance(output, dict)
    assert output.get("refresh_worker", False) is sick
    assert "\n" not in output["error"]


async def test_the_sdk_makes_a_failure_and_a_refresh_of_a_sick_gpu() -> None:
    from runpod.serverless.modules.rp_job import run_job

    worker = worker_with(classify(AcceleratorError("CUDA error: unspecified launch failure")))
    result = await run_job(worker.handle, {"id": "a", "input": {"prompt": "x"}})
    assert result == {"error": "the device failed; see the server's log", "stopPod": True}


async def test_a_worker_with_a_sick_gpu_takes_no_more_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scaler = DrainingScaler({})
    monkeypatch.setattr(DrainingScaler, "current", scaler)
    await worker_with(InvalidParameter("bad")).handle({"id": "a", "input": {"prompt": "x"}})
    assert not scaler._draining.is_set()
    error = classify(AcceleratorError("CUDA error: unspecified launch failure"))
    await worker_with(error).handle({"id": "a", "input": {"prompt": "x"}})
    assert scaler._draining.is_set()


async def test_a_worker_whose_device_hangs_asks_for_a_fresh_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scaler = DrainingScaler({})
    monkeypatch.setattr(DrainingScaler, "current", scaler)
    worker = worker_with(Unavailable("the device has failed"))
    job: Any = {"id": "a", "input": {"prompt": "x"}}
    assert "refresh_worker" not in await worker.handle(job)
    app: Any = worker._app
    app.alive = False
    assert (await worker.handle(job))["refresh_worker"]
    assert scaler._draining.is_set()


async def test_a_bug_is_answered_with_an_id_and_no_internals() -> None:
    worker = worker_with(KeyError("secret"))
    output = await worker.handle({"id": "a", "input": {"prompt": "x"}})
    assert isinstance(output, dict)
    assert "unexpected error, id" in output["error"]
    assert "secret" not in output["error"]


async def test_the_jobs_of_the_queue_are_counted() -> None:
    before = counted()
    for response in (response_to(GenerateRequest(prompt="x")), InvalidParameter("bad")):
        await worker_with(response).handle({"id": "a", "input": {"prompt": "x"}})
    grown = counted().since(before)
    for outcome in ("ok", "invalid"):
        name = f"sdbento_requests_total{{model=none,outcome={outcome},route=worker}}"
        assert grown[name] == 1


async def test_a_job_of_the_queue_may_run_for_as_long_as_it_says() -> None:
    worker = worker_with(response_to(GenerateRequest(prompt="x")))
    for given in ({"timeout": 900}, {}):
        await worker.handle({"id": "a", "input": {"prompt": "x", **given}})
    app: Any = worker._app
    assert app.seconds == [900, None]  # not for SDBENTO_MAX_TIMEOUT to refuse, as with /run


async def test_a_job_of_the_queue_may_bring_a_bucket() -> None:
    app: Any = FakeApp(response_to(GenerateRequest(prompt="x", seed=1)))
    delivery = Delivery(load_settings(allow_private_urls=True), limited=True)
    with storing() as store:
        given = {"accessId": "a", "accessSecret": SECRET, "bucketName": "pictures"}
        job = {"id": "a", "input": {"prompt": "x"}}
        worker = Worker(app, delivery, answer_call=no_calls)
        output = await worker.handle({**job, "s3Config": {**given, "endpointUrl": store.url}})
        assert isinstance(output, list)
        assert output[0].startswith(f"{store.url}/pictures/a/0-")
        assert len(store.objects) == 1
    refused = await worker.handle({**job, "s3Config": given})
    assert refused == {"error": "s3Config.endpointUrl is required"}


async def test_a_job_of_the_queue_may_be_a_call_of_another_api() -> None:
    async def answer(call: Call) -> Any:
        if "steps" in call.payload:
            return {"images": ["AAAA"], "info": call.path}
        raise InvalidParameter("steps is missing")

    app: Any = FakeApp(response_to(GenerateRequest(prompt="x")))
    worker = Worker(app, Delivery(load_settings(), limited=True), answer)
    output = await worker.handle({"id": "a", "input": {"prompt": "x", "steps": 4}})
    assert output == {"images": ["AAAA"], "info": "/sdapi/v1/txt2img"}
    output = await worker.handle({"id": "a", "input": {"prompt": "x", "cfg_scale": 4}})
    assert output == {"error": "steps is missing"}


def test_the_flags_are_no_part_of_the_request() -> None:
    given = {"prompt": "x", "stream": True, "return": "full", "allow_jpeg": True, "seed": 3}
    parsed = input_of({"id": "a", "input": given})
    assert isinstance(parsed, JobInput)
    flags = parsed.flags
    assert (flags.stream, flags.shape, flags.allow_jpeg) == (True, "full", True)
    assert parsed.request == GenerateRequest(prompt="x", seed=3)


@pytest.mark.parametrize("job", [{"id": "a"}, {"input": None}, {"input": [1]}])
def test_an_input_that_is_no_object_is_refused(job: dict[str, Any]) -> None:
    with pytest.raises(MalformedRequest, match="input must be a JSON object"):
        input_of(job)


def test_the_worker_takes_enough_jobs_to_fill_its_batch_and_never_more_than_it_may_queue() -> None:
    assert concurrency(load_settings()) == 8
    assert concurrency(load_settings(max_batch_size=16, runpod_prefetch=0)) == 16
    assert concurrency(load_settings(max_queue_size=1)) == 5
