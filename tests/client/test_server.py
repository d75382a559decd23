"""The clients against a real `bentoml serve` on `shapes`: pictures, streams, jobs, the way out."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from dataclasses import asdict
from io import BytesIO
from typing import TypedDict

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sdbento.client import AsyncClient, Client
from sdbento.client.answers import GeneratedImage
from sdbento.client.errors import JobFailed, JobUnfinished, NoAnswer, NotConnected, NotUnderstood
from sdbento.client.events import Done, Preview, Queued, Step
from sdbento.client.fields import Fields
from sdbento.errors import InvalidParameter, MalformedRequest, NotFound, UnknownModel
from sdbento.images.metadata import read_metadata
from tests.support.images import gradient
from tests.support.server import QUICK, Server, alike, free_port, generated, pixels


class Quickly(TypedDict):
    num_inference_steps: int
    seed: int


PROMPT: str = QUICK["prompt"]
QUICKLY: Quickly = {"num_inference_steps": 4, "seed": 7}
LONG: Fields = {"num_inference_steps": 150, "num_images": 16, "seed": 7}
SOON = 60.0


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, transport=httpx.HTTPTransport()) as client:
        yield client


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, transport=httpx.AsyncHTTPTransport()) as client:
        yield client


def assert_alike(image: GeneratedImage, expected: NDArray[np.int16]) -> None:
    assert alike(pixels(image.data), expected)


def until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def idle(server: Server) -> bool:
    """Whether no request is unfinished: the next one would be the only one."""
    stream = server.client.stream("POST", "/generate_stream", json=QUICK)
    with stream as response:
        first = next(line for line in response.iter_lines() if line.startswith("data: "))
    return '"position": 0' in first


# Images


def test_pictures_are_those_of_generate(server: Server, client: Client) -> None:
    made = client.generate(PROMPT, num_images=2, **QUICKLY)
    for image, expected in zip(made.images, generated(server, **QUICK, num_images=2), strict=True):
        assert_alike(image, expected)
    assert made.seeds == [7, 8]
    assert made.parameters["num_inference_steps"] == 4
    embedded = read_metadata(made.image.data)
    assert embedded.infotext == made.infotexts[0]


def test_an_edit_takes_files_of_any_kind(server: Server, client: Client) -> None:
    source = gradient(128, 128)
    buffer = BytesIO()
    source.save(buffer, "PNG")
    mask = Image.new("L", (128, 128), 255)
    made = [
        client.edit(image, PROMPT, mask, strength=0.5, **QUICKLY)
        for image in (source, buffer.getvalue(), BytesIO(buffer.getvalue()))
    ]
    for one in made[1:]:
        assert_alike(one.image, pixels(made[0].image.data))


def test_the_servers_errors_are_raised(client: Client) -> None:
    with pytest.raises(UnknownModel) as refused:
        client.generate(PROMPT, model="no-such-model")
    assert (refused.value.status, refused.value.param) == (404, "model")
    assert refused.value.request_id
    with pytest.raises(InvalidParameter, match="cannot be decoded"):
        client.edit(b"no image", PROMPT)
    with pytest.raises(UnknownModel):
        list(client.stream(PROMPT, model="no-such-model"))


def test_models_and_samplers_are_listed(client: Client) -> None:
    assert client.ready()
    [default] = [model for model in client.models() if model.default]
    assert default.name == "shapes" and default.loaded
    assert "Euler a" in {sampler.name for sampler in client.samplers()} | {
        alias for sampler in client.samplers() for alias in sampler.aliases
    }


def test_what_runs_is_told_in_numbers(client: Client) -> None:
    stats = client.stats()
    assert stats.ready and stats.version and "shapes" in {model.name for model in stats.models}


def test_threads_share_one_client(client: Client) -> None:
    def make(seed: int) -> list[int]:
        return client.generate(PROMPT, num_inference_steps=2, seed=seed).seeds

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(make, range(16))) == [[seed] for seed in range(16)]


async def test_tasks_share_one_client(async_client: AsyncClient) -> None:
    tasks = [async_client.generate(PROMPT, num_inference_steps=2, seed=seed) for seed in range(16)]
    assert [made.seeds for made in await asyncio.gather(*tasks)] == [[seed] for seed in range(16)]


def test_nobody_there() -> None:
    client = Client(
        f"http://127.0.0.1:{free_port()}", transport=httpx.HTTPTransport(), max_retries=0
    )
    with client:
        assert not client.ready()
        with pytest.raises(NotConnected):
            client.models()


# Streams


def test_a_stream_tells_each_step(server: Server, client: Client) -> None:
    with client.stream(PROMPT, preview_every=2, **QUICKLY) as stream:
        events = list(stream)
        assert stream.progress == 1.0
    assert isinstance(events[0], Queued)
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2, 3, 4]
    previews = [event for event in events if isinstance(event, Preview)]
    assert previews and previews[0].to_pil().size == (256, 256)
    assert isinstance(events[-1], Done)
    [image] = events[-1].generation.images
    assert_alike(image, generated(server, **QUICK)[0])


def test_a_stream_that_is_left_stops_the_work(server: Server, client: Client) -> None:
    for event in client.stream(PROMPT, **LONG):
        if isinstance(event, Step):
            break
    until(lambda: idle(server))  # 2400 steps would take longer


async def test_a_task_that_is_cancelled_stops_the_work(
    server: Server, async_client: AsyncClient
) -> None:
    task = asyncio.create_task(async_client.generate(PROMPT, **LONG))
    while await asyncio.to_thread(idle, server):
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(until, lambda: idle(server))


async def test_an_async_stream_that_is_left_stops_the_work(
    server: Server, async_client: AsyncClient
) -> None:
    async with async_client.stream(PROMPT, **LONG) as stream:
        async for event in stream:
            if isinstance(event, Step):
                break
    await asyncio.to_thread(until, lambda: idle(server))


# Jobs


def test_a_job_is_submitted_and_waited_for(server: Server, client: Client) -> None:
    job = client.jobs.submit(PROMPT, policy={"executionTimeout": 60_000}, **QUICKLY)
    assert job.status == "IN_QUEUE"
    [image] = client.jobs.wait(job.id, timeout=SOON).images
    assert_alike(image, generated(server, **QUICK)[0])
    ended = client.jobs.status(job.id)
    assert ended.status == "COMPLETED" and not ended.unfinished
    assert ended.execution is not None and ended.execution > 0
    assert ended.output["seeds"] == [7]
    with pytest.raises(MalformedRequest, match="this one is COMPLETED"):
        client.jobs.retry(job.id)


def test_a_job_tells_what_happens(client: Client) -> None:
    job = client.jobs.submit(PROMPT, preview_every=2, **QUICKLY)
    events = list(client.jobs.stream(job.id))
    steps = [event.step for event in events if isinstance(event, Step)]
    assert steps == sorted(steps) and steps[-1] == 4
    assert isinstance(events[-1], Done) and events[-1].generation.seeds == [7]


def test_a_job_goes_on_until_it_is_cancelled(client: Client) -> None:
    job = client.jobs.submit(PROMPT, **LONG)
    assert isinstance(next(client.jobs.stream(job.id)), Queued | Step)
    with pytest.raises(JobUnfinished):
        client.jobs.wait(job.id, timeout=0.0)
    assert client.jobs.cancel(job.id).status == "CANCELLED"
    with pytest.raises(JobFailed, match="CANCELLED") as ended:
        client.jobs.wait(job.id)
    assert ended.value.job.status == "CANCELLED"
    with pytest.raises(JobFailed):
        list(client.jobs.stream(job.id))


def test_a_job_that_fails_says_why(client: Client) -> None:
    job = client.jobs.submit(PROMPT, model="no-such-model")
    with pytest.raises(JobFailed, match="no-such-model"):
        client.jobs.wait(job.id)


@pytest.mark.parametrize("job_id", ["none", "..", "../models", "a/b", "ü", "%00", "a?b#c", " "])
def test_an_unknown_job_is_not_found(client: Client, job_id: str) -> None:
    for ask in (client.jobs.status, client.jobs.wait, client.jobs.cancel, client.jobs.retry):
        with pytest.raises(NotFound):
            ask(job_id)
    with pytest.raises(NotFound):
        list(client.jobs.stream(job_id))


def test_a_job_in_another_form_is_shown_by_its_status(server: Server, client: Client) -> None:
    job_id = server.client.post("/run", json={"input": QUICK}).json()["id"]
    with pytest.raises(NotUnderstood, match=r"jobs\.status returns it as it is"):
        client.jobs.wait(job_id)
    [image] = client.jobs.status(job_id).output
    assert isinstance(image, str)


async def test_jobs_can_be_awaited(async_client: AsyncClient) -> None:
    jobs = async_client.jobs
    job = await jobs.submit(PROMPT, **QUICKLY)
    assert (await jobs.wait(job.id, timeout=SOON)).seeds == [7]
    assert (await jobs.status(job.id)).status == "COMPLETED"
    second = await jobs.submit(PROMPT, **QUICKLY)
    events = [event async for event in jobs.stream(second.id)]
    assert isinstance(events[-1], Done)
    long = await jobs.submit(PROMPT, **LONG)
    with pytest.raises(JobUnfinished):
        await jobs.wait(long.id, timeout=0.0)
    assert (await jobs.cancel(long.id)).status == "CANCELLED"
    with pytest.raises(MalformedRequest):
        await jobs.retry(long.id)


# The batch


def test_the_batch_is_followed(client: Client) -> None:
    with closing(client.batch()) as batches, client.stream(PROMPT, **LONG) as stream:
        next(stream)
        batch = next(one for one in batches if one.lanes)
    assert batch.lanes[0].model == "shapes"
    assert any(one.yours and one.prompt == PROMPT for one in batch.requests)


async def test_the_batch_is_followed_async(async_client: AsyncClient) -> None:
    async with aclosing(async_client.batch()) as batches:
        batch = await anext(batches)
    assert "shapes" in [model.name for model in batch.models]


def test_it_asks_again_when_a_stream_of_snapshots_ends(client: Client) -> None:
    with closing(client.batch()) as batches:
        snapshot = json.dumps(asdict(next(batches)))
    answers = [f"data: {snapshot}\n\n"] * 2 + [""]
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=answers.pop(0)))
    with Client(transport=transport) as offline, closing(offline.batch()) as batches:
        assert next(batches) == next(batches)
        with pytest.raises(NoAnswer, match="before it told"):
            next(batches)
