"""What is under way for whom: progress, previews, interrupts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

import pytest

from sdbento.access.caller import Caller, acting_for
from sdbento.doors.a1111.work import Generation, Work
from sdbento.engine.handle import Handle, Stepped
from sdbento.errors import GenerationFailed
from sdbento.request.events import Done, Event, Queued
from sdbento.request.schema import GenerateRequest, GenerateResponse, Timings
from tests.support.fakes import make_trajectory

REQUEST = GenerateRequest(prompt="x", seed=5)


class FakeApp:
    """Makes requests one after another, each done once its `gate` is open; remembers them."""

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.gates = [asyncio.Event() for _ in range(4)]
        self.stopped = False
        self.fails: dict[int, Exception] = {}
        self.handles: list[Handle] = []

    async def stream(
        self, *requests: GenerateRequest, on_start: Callable[[Handle], None]
    ) -> AsyncGenerator[Event, None]:
        self.requests = list(requests)
        try:
            for number, request in enumerate(requests):
                yield Queued(0, 3.0)
                handle = Handle([make_trajectory(20)], lambda _: None, lambda _: None)
                on_start(handle)
                for image in range(request.num_images):
                    yield Stepped(image, 10, 20, 2.0)
                self.handles.append(handle)
                await self.gates[number].wait()
                if number in self.fails:
                    raise self.fails[number]
                for image in range(request.num_images):
                    yield Stepped(image, 20, 20, 0.0)
                yield Done(response(request))
        finally:
            self.stopped = True


def response(request: GenerateRequest) -> GenerateResponse:
    assert request.seed is not None
    seeds = [request.seed + i for i in range(request.num_images)]
    texts = [str(seed) for seed in seeds]
    timings = Timings(queued=0, denoising=0, decoding=0, total=0)
    return GenerateResponse(
        images=texts, seeds=seeds, infotexts=texts, model="m", parameters={}, timings=timings
    )


def begin(app: FakeApp, num_images: int = 1) -> tuple[Generation, asyncio.Task[Any]]:
    generation = Generation(cast(Any, app), "txt2img", num_images)
    return generation, asyncio.create_task(generation.run(REQUEST))


async def started(app: FakeApp, num_requests: int) -> None:
    while len(app.handles) < num_requests:
        await asyncio.sleep(0)


def seeds_of(responses: list[GenerateResponse]) -> list[int]:
    return [seed for one in responses for seed in one.seeds]


async def test_many_images_are_several_requests_with_consecutive_seeds() -> None:
    app = FakeApp()
    _, task = begin(app, num_images=37)
    await started(app, 1)
    assert [request.num_images for request in app.requests] == [16, 16, 5]
    for gate in app.gates:
        gate.set()
    assert seeds_of(await task) == [*range(5, 42)]


async def test_progress() -> None:
    app = FakeApp()
    generation, task = begin(app, num_images=20)
    assert (generation.progress, generation.num_steps, generation.step) == (0, 0, 0)
    await started(app, 1)
    assert (generation.progress, generation.num_steps, generation.step) == (0.4, 20, 8)
    assert generation.num_finished == 0
    assert generation.eta > 2.0  # what comes after the first 16 takes time as well
    app.gates[0].set()
    await started(app, 2)
    assert (generation.progress, generation.num_finished) == (0.9, 16)
    assert generation.eta == 2.0
    app.gates[1].set()
    await task


async def test_one_failure_fails_all() -> None:
    app = FakeApp()
    app.fails = {1: GenerationFailed("this one")}
    _, task = begin(app, num_images=48)
    for gate in app.gates:
        gate.set()
    with pytest.raises(GenerationFailed, match="this one"):
        await task
    assert app.stopped and len(app.handles) == 2


async def test_an_interrupt_leaves_what_is_finished() -> None:
    app = FakeApp()
    generation, task = begin(app, num_images=32)
    app.gates[0].set()
    await started(app, 2)
    generation.interrupt()
    assert seeds_of(await task) == [*range(5, 21)]
    assert generation.interrupted and app.stopped


async def test_what_is_interrupted_before_it_runs_makes_nothing() -> None:
    app = FakeApp()
    generation = Generation(cast(Any, app), "txt2img", 1)
    generation.interrupt()
    assert await generation.run(REQUEST) == []
    assert app.requests == []


async def test_a_client_that_leaves_stops_everything() -> None:
    app = FakeApp()
    _, task = begin(app, num_images=32)
    await started(app, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert app.stopped


async def test_previews_are_made_while_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    app = FakeApp()
    generation, task = begin(app)
    generation.watch()
    await started(app, 1)
    [trajectory] = app.handles[0].trajectories
    assert trajectory.preview_every == 2
    monkeypatch.setattr("sdbento.doors.a1111.work.WATCHED", -1.0)
    generation.watch()
    assert trajectory.preview_every == 0
    app.gates[0].set()
    await task


@pytest.mark.parametrize("caller", [Caller("a"), Caller(address="192.0.2.1")])
async def test_nobody_sees_or_interrupts_the_work_of_another(caller: Caller) -> None:
    work, app = Work(), FakeApp()
    with acting_for(caller):
        generation = Generation(cast(Any, app), "txt2img", 1)
        with work.listing(generation):
            assert work.of_caller() == [generation]
            for other in (Caller("b"), Caller(), Caller(""), Caller(address="192.0.2.2")):
                with acting_for(other):
                    assert work.of_caller() == []
        assert work.of_caller() == []
