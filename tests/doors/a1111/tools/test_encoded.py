"""Work on images is shared between keys, and counted as requests are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sdbento.access.caller import Caller, acting_for
from sdbento.access.threads import SharedThreads
from sdbento.app import App
from sdbento.doors.a1111.tools.encoded import THREADS, work_on_image
from sdbento.errors import Overloaded
from sdbento.settings import Settings
from tests.support.fakes import FakeRunner

ALICE, BOB = Caller("alice", shares=True), Caller("bob", shares=True)


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    settings = Settings(sd_model="shapes", state_dir=tmp_path, max_queue_size=9, max_batch_size=1)
    app = App(settings, FakeRunner())
    yield app
    app.close(grace=0)


@pytest.fixture
def busy() -> threading.Event:
    """Work waits for it."""
    return threading.Event()


def start(
    threads: SharedThreads, app: App, busy: threading.Event, caller: Caller
) -> asyncio.Task[bool]:
    with acting_for(caller):
        return asyncio.create_task(work_on_image(app, threads, busy.wait, 10))


async def test_a_key_with_many_images_leaves_a_thread_to_others(
    app: App, busy: threading.Event
) -> None:
    threads = SharedThreads(THREADS, "test")
    many = [start(threads, app, busy, ALICE) for _ in range(3)]
    await asyncio.sleep(0.05)
    with acting_for(BOB):
        assert await asyncio.wait_for(work_on_image(app, threads, lambda: 5), 5) == 5
    assert not any(task.done() for task in many)
    busy.set()
    assert await asyncio.gather(*many) == [True] * 3


async def test_a_key_that_leaves_does_not_get_a_second_thread(
    app: App, busy: threading.Event
) -> None:
    threads = SharedThreads(THREADS, "test")
    for _ in range(3):
        task = start(threads, app, busy, ALICE)
        await asyncio.sleep(0.05)
        task.cancel()
    with acting_for(BOB):
        assert await asyncio.wait_for(work_on_image(app, threads, lambda: 5), 5) == 5
    busy.set()


async def test_work_on_images_takes_places_of_the_queue(app: App, busy: threading.Event) -> None:
    threads = SharedThreads(THREADS, "test")
    tasks = [start(threads, app, busy, Caller()) for _ in range(10)]
    await asyncio.sleep(0.05)
    with pytest.raises(Overloaded, match="the queue is full"):
        await work_on_image(app, threads, lambda: 5)
    busy.set()
    await asyncio.gather(*tasks)
    assert await work_on_image(app, threads, lambda: 5) == 5
