"""The router, with engine processes that do only what a test says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from sdbento.backend.pool import router
from sdbento.backend.pool.devices import EngineDevice
from sdbento.backend.pool.messages import (
    Begin,
    Cancel,
    Close,
    Configure,
    Failed,
    Finished,
    GiveUp,
    Happened,
    Listen,
    Lost,
    Preload,
    Preview,
    Report,
    Submitted,
)
from sdbento.backend.pool.router import EnginePool
from sdbento.backend.pool.slot import Slot
from sdbento.backend.protocol import ResidentSpec
from sdbento.engine.handle import Calls, Estimated
from sdbento.engine.trajectory import Stage
from sdbento.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidParameter,
    SDBentoError,
    Unavailable,
)
from sdbento.metrics.exposition import EXPOSITION
from sdbento.metrics.exposition import Snapshot as Counted
from sdbento.request.result import Begun
from sdbento.settings import Settings
from tests.support.fake_loader import spec

SOON = 20.0
STEPPED = {Stage.STEP: Calls(began=1.0, ended=2.0)}


class FakeEngine:
    """Notes what it is sent."""

    made: list[FakeEngine]

    def __init__(self, device: EngineDevice, on_message: Any, on_end: Any) -> None:
        self.device = device
        self.report: Report | None = None
        self.num_messages = 0
        self.heard = 0.0
        self.pid = 0
        self.sent: list[Any] = [Configure(device.settings, device.name)]
        self.killed = False
        self._on_message, self._on_end = on_message, on_end
        self.made.append(self)

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def kill(self) -> None:
        self.killed = True

    def wait(self, seconds: float) -> bool:
        return any(isinstance(message, Close) for message in self.sent)

    def say(self, message: Any) -> None:
        self.num_messages, self.heard = self.num_messages + 1, time.monotonic()
        self._on_message(self, message)

    def die(self) -> None:
        self._on_end(self)

    def get_up(self, *models: str) -> None:
        residents = tuple(ResidentSpec(spec(name), 10**9, "SDPA") for name in models)
        self.say(Report(is_ready=True, endings=(), residents=residents, room=10**11))

    def has(self, kind: type, number: int | None = None) -> bool:
        return any(
            isinstance(message, kind) and number in (None, getattr(message, "number", None))
            for message in self.sent
        )


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    FakeEngine.made = []
    monkeypatch.setattr(router, "RemoteEngine", FakeEngine)
    monkeypatch.setattr(router, "TICK", 0.01)
    return FakeEngine.made


@pytest.fixture
def broken() -> list[str]:
    return []


@pytest.fixture
def pool(engines: list[FakeEngine], broken: list[str]) -> Iterator[EnginePool]:
    settings = Settings(sd_model="a")
    pool = EnginePool(
        [EngineDevice(f"GPU {i}", i, settings) for i in range(2)], 1000.0, broken.append
    )
    pool.start()
    until_now(lambda: len(engines) == 2)
    yield pool
    pool.close(0.0)


def until_now(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.002)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():
            await asyncio.sleep(0.002)


def request(model: str = "a", timeout: float = 1000.0) -> Any:
    settled = SimpleNamespace(
        guidance_scale=5.0, num_inference_steps=10, strength=None, num_images=1
    )
    made = SimpleNamespace(
        specs=[spec(model)],
        settled=settled,
        size=(512, 512),
        deadline=time.monotonic() + timeout,
    )
    made.without_sources = lambda: made
    return made


async def begun(pool: EnginePool, engine: FakeEngine, number: int) -> Begun:
    """A request that `engine` has taken up."""
    beginning = asyncio.create_task(pool.begin(request()))
    await until(lambda: engine.has(Begin, number))
    engine.say(Submitted(number, "DDIM", ("a warning",), 0.5))
    return await beginning


async def given(engine: FakeEngine, number: int) -> None:
    """An engine that lives is given the request that another had."""

    def has() -> bool:
        engine.get_up("a")
        return engine.has(Begin, number)

    await until(has)


def finished(number: int, colour: str = "red") -> Finished:
    return Finished(number, [Image.new("RGB", (8, 8), colour)], STEPPED)


async def test_a_request_goes_to_an_engine_and_its_images_come_back(
    pool: EnginePool, engines: list[FakeEngine]
) -> None:
    for engine in engines:
        engine.get_up("a")
    begin = await begun(pool, engines[0], 1)
    assert (begin.own_sampler, begin.warnings) == ("DDIM", ("a warning",))
    events = begin.handle.events()
    first = asyncio.ensure_future(anext(events))
    await until(lambda: engines[0].has(Listen, 1))
    engines[0].say(Happened(1, Estimated(2.0)))
    assert await first == Estimated(2.0)
    begin.handle.preview_every(3)
    await until(lambda: Preview(1, 3) in engines[0].sent)
    engines[0].say(finished(1))
    await begin.handle.wait()
    assert begin.handle.images[0].getpixel((0, 0)) == (255, 0, 0)
    assert (begin.handle.submitted, begin.handle.started) == (0.5, 1.0)


async def test_requests_are_divided_and_go_to_who_has_their_model(
    pool: EnginePool, engines: list[FakeEngine]
) -> None:
    engines[0].get_up("a")
    engines[1].get_up("a", "b")
    for number, (model, engine) in enumerate((("b", 1), ("a", 0), ("a", 0), ("b", 1)), start=1):
        task = asyncio.create_task(pool.begin(request(model)))
        await until(lambda: engines[engine].has(Begin, number))  # noqa: B023
        task.cancel()
        await asyncio.wait([task])
    assert {resident.device for resident in pool.residents()} == {0, 1}


@pytest.mark.parametrize("how", ["dies", "is lost"])
async def test_what_an_engine_had_is_made_again_by_another(
    how: str, pool: EnginePool, engines: list[FakeEngine]
) -> None:
    for engine in engines:
        engine.get_up("a")
    begin = await begun(pool, engines[0], 1)
    begin.handle.preview_every(2)
    late = engines[0]
    if how == "dies":
        late.die()
    else:
        late.say(Lost("the GPU has failed"))
    await given(engines[1], 1)
    assert late.killed
    late.say(finished(1, "black"))  # too late
    engines[1].say(Submitted(1, "DDIM", (), 0.5))
    await until(lambda: Preview(1, 2) in engines[1].sent)
    engines[1].say(finished(1))
    await begin.handle.wait()
    assert begin.handle.images[0].getpixel((0, 0)) == (255, 0, 0)
    await until(lambda: len(engines) == 3)  # it is started anew
    assert pool.alive and pool.ready


def evictions() -> float:
    """As /metrics would show them."""
    (family,) = [one for one in EXPOSITION.collect() if one.name == "sdbento_evictions"]
    return float(family.samples[0].value)


async def test_what_engines_count_is_added_up_and_outlives_them(
    pool: EnginePool, engines: list[FakeEngine]
) -> None:
    before = evictions()
    for engine, counted in zip(engines, (2.0, 3.0), strict=True):
        totals: Counted = {"sdbento_evictions_total": {(): [counted]}}
        engine.say(Report(True, (), (), 0, totals))
    await until(lambda: evictions() == before + 5.0)
    engines[0].die()
    await until(lambda: len(engines) == 3)
    assert evictions() == before + 5.0


async def test_who_loses_two_engines_is_told_so(
    pool: EnginePool, engines: list[FakeEngine]
) -> None:
    for engine in engines:
        engine.get_up("a")
    begin = await begun(pool, engines[0], 1)
    engines[0].die()
    await given(engines[1], 1)
    engines[1].die()
    with pytest.raises(Unavailable, match="two devices failed") as caught:
        await begin.handle.wait()
    assert caught.value.retry_after


async def test_engines_that_die_together_count_as_one_lost(
    pool: EnginePool, engines: list[FakeEngine]
) -> None:
    for engine in engines:
        engine.get_up("a")
    begin = await begun(pool, engines[0], 1)
    for engine in engines[:2]:
        engine.die()
        await asyncio.sleep(10 * router.TICK)  # until the next is noticed
    await until(lambda: len(engines) == 4)
    await given(engines[2], 1)
    assert not begin.handle.done.done()


async def test_without_engines_requests_wait_for_one_and_new_ones_are_refused(
    pool: EnginePool, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slot, "is_alive", property(lambda slot: slot.is_up))
    engines[0].get_up("a")
    begin = await begun(pool, engines[0], 1)
    engines[1].die()
    engines[0].die()
    await until(lambda: not pool.alive)
    with pytest.raises(Unavailable, match="started anew"):
        pool.check_usable()
    await until(lambda: len(engines) == 4)
    await given(engines[2], 1)
    assert pool.alive
    engines[2].say(finished(1))
    await begin.handle.wait()


async def test_a_request_that_no_engine_takes_ends_at_its_deadline(
    pool: EnginePool, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slot, "fail", lambda slot: setattr(slot, "engine", None))
    monkeypatch.setattr(EnginePool, "_start", lambda *_: None)
    for engine in engines:
        engine.die()
    with pytest.raises(DeadlineExceeded, match="no device"):
        await pool.begin(request(timeout=0.05))


async def test_a_request_that_a_frozen_engine_keeps_ends_soon_after_its_deadline(
    pool: EnginePool, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "LATE", 0.1)
    engines[0].get_up("a")
    with pytest.raises(DeadlineExceeded, match="no device"):
        await pool.begin(request(timeout=0.05))
    assert engines[0].has(Cancel, 1)


async def test_a_bug_of_the_router_fails_its_request_and_no_other(
    pool: EnginePool,
    engines: list[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engines[0].get_up("a")
    with monkeypatch.context() as patched:
        patched.setattr(router, "choose", lambda *_: 1 // 0)
        with pytest.raises(SDBentoError, match="unexpected error"):
            await pool.begin(request())
    await until(lambda: "the router failed" in caplog.text)
    assert (await begun(pool, engines[0], 2)).own_sampler == "DDIM"


async def test_the_error_of_an_engine_is_the_requests(
    pool: EnginePool, engines: list[FakeEngine]
) -> None:
    engines[0].get_up("a")
    beginning = asyncio.create_task(pool.begin(request()))
    await until(lambda: engines[0].has(Begin, 1))
    engines[0].say(Failed(1, InvalidParameter("no such LoRA", param="lora"), {}))
    with pytest.raises(InvalidParameter, match="no such LoRA"):
        await beginning


async def test_it_is_known_how_far_a_request_came_that_failed_or_was_cancelled(
    pool: EnginePool, engines: list[FakeEngine]
) -> None:
    engines[0].get_up("a")
    cancelled, failed = await begun(pool, engines[0], 1), await begun(pool, engines[0], 2)
    engines[0].say(Report(True, (), (), 10**11, calls={1: STEPPED, 2: {}, 3: STEPPED}))
    await until(lambda: cancelled.handle.calls == STEPPED)
    cancelled.handle.cancel()
    with pytest.raises(Cancelled):
        await cancelled.handle.wait()
    engines[0].say(Failed(2, DeadlineExceeded("late"), STEPPED))
    with pytest.raises(DeadlineExceeded):
        await failed.handle.wait()
    assert failed.handle.calls == cancelled.handle.calls == STEPPED


async def test_what_a_lost_engine_did_is_no_part_of_a_request_that_another_has_made_again(
    pool: EnginePool, engines: list[FakeEngine]
) -> None:
    for engine in engines:
        engine.get_up("a")
    begin = await begun(pool, engines[0], 1)
    engines[0].say(Report(True, (), (), 10**11, calls={1: STEPPED}))
    engines[0].die()
    await given(engines[1], 1)
    assert begin.handle.calls == STEPPED
    engines[1].say(Submitted(1, "DDIM", (), 0.5))
    await until(lambda: begin.handle.calls == {})


async def test_whoever_gives_up_frees_the_engine(
    pool: EnginePool, engines: list[FakeEngine]
) -> None:
    engines[0].get_up("a")
    begin = await begun(pool, engines[0], 1)
    begin.handle.cancel()
    with pytest.raises(Cancelled):
        await begin.handle.wait()
    assert engines[0].has(Cancel, 1)
    early = asyncio.create_task(pool.begin(request()))
    await until(lambda: engines[0].has(Begin, 2))
    early.cancel()
    await until(lambda: engines[0].has(Cancel, 2))


async def test_a_server_that_stops_tells_everybody(
    pool: EnginePool, engines: list[FakeEngine]
) -> None:
    engines[0].get_up("a")
    begin = await begun(pool, engines[0], 1)
    pool.give_up()
    with pytest.raises(SDBentoError, match="stopping"):
        await begin.handle.wait()
    with pytest.raises(SDBentoError, match="stopping"):
        await pool.begin(request())
    assert engines[0].has(GiveUp)
    await asyncio.to_thread(pool.close, 0.0)
    assert engines[0].has(Close)
    assert engines[1].killed  # it had not started, and would not have read it


async def test_an_engine_that_says_nothing_is_replaced(
    engines: list[FakeEngine],
) -> None:
    device = EngineDevice("GPU 0", 0, Settings(sd_model="a"))
    pool = EnginePool([device, device], 0.2)
    pool.start()
    try:
        await until(lambda: len(engines) == 2)
        engines[0].get_up("a")
        await until(lambda: engines[0].killed)
        assert not engines[1].killed  # it starts, which may take longer
    finally:
        await asyncio.to_thread(pool.close, 0.0)


async def test_where_no_engine_can_be_started_another_process_may_do_better(
    pool: EnginePool,
    engines: list[FakeEngine],
    broken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdbento.backoff.Backoff.next_pause", lambda _: 0.0)
    died = 0
    while not broken:
        await until(lambda: len(engines) > died or broken)  # noqa: B023
        if died == 2 * router.HOPELESS - 1:
            late = asyncio.create_task(pool.begin(request()))
            await until(lambda: any(engine.has(Begin) for engine in engines))
        if len(engines) > died:
            engines[died].die()
            died += 1
    assert not pool.alive
    assert died >= 2 * router.HOPELESS
    with pytest.raises(Unavailable, match="is being restarted"):
        await late


async def test_a_model_is_loaded_early_by_one_engine(
    pool: EnginePool, engines: list[FakeEngine]
) -> None:
    engines[0].get_up()
    engines[1].get_up("b")
    loading: Future[Any] = pool.preload(spec("b"))
    await until(lambda: engines[1].has(Preload))
    loading.cancel()
    await until(lambda: engines[1].has(Cancel))
