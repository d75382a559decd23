"""Who watches: on an engine with a fake runner."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest
import pytest_asyncio

from sdbento.access.caller import Caller, acting_for
from sdbento.engine.loop import Engine
from sdbento.engine.planner import Planner
from sdbento.errors import LimitReached, Overloaded, Unavailable
from sdbento.live import recorder
from sdbento.live.observation import Observation
from sdbento.live.recorder import Recorder
from sdbento.live.snapshot import Snapshot
from sdbento.live.watchers import MAX_WATCHERS, Watchers
from tests.support.fakes import FakeRunner, make_trajectory

FAR = 60.0


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine(FakeRunner(seconds=0.002), Planner(4))
    engine.start()
    yield engine
    await asyncio.to_thread(engine.close, 0.0)


class Observed:
    """An engine as what Watchers watch."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.check_usable = engine.check_usable

    def observe(
        self, publish: Callable[[Snapshot], None], on_failure: Callable[[], None]
    ) -> Callable[[], None]:
        return Observation(self.engine, publish, on_failure).end


def observer_of(engine: Engine) -> object:
    return engine.observer


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_the_engine_is_observed_only_while_somebody_watches(engine: Engine) -> None:
    watchers = Watchers(Observed(engine))
    assert observer_of(engine) is None
    async with aclosing(watchers.snapshots()) as one, aclosing(watchers.snapshots()) as other:
        assert (await anext(one)).batch.queue.requests == 0
        observer = observer_of(engine)
        assert isinstance(observer, Recorder)
        await anext(other)
        assert observer_of(engine) is observer
    assert observer_of(engine) is None
    async with aclosing(watchers.snapshots()) as again:
        assert (await anext(again)).batch.number == 1


async def test_the_end_of_the_last_request_is_told_and_then_a_heartbeat(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "HEARTBEAT", 0.3)
    async with aclosing(Watchers(Observed(engine)).snapshots()) as snapshots:
        await anext(snapshots)
        engine.submit([make_trajectory(150)], time.monotonic() + FAR)
        seen = [await anext(snapshots)]
        while seen[-1].batch.queue.requests or seen[-1].batch.calls == 0:
            seen.append(await anext(snapshots))
        assert any(one.batch.lanes for one in seen)
        assert seen[-1].batch.calls == 150
        await anext(snapshots)


async def test_a_slow_watcher_gets_the_newest_and_holds_up_nobody(engine: Engine) -> None:
    watchers = Watchers(Observed(engine))
    async with aclosing(watchers.snapshots()) as slow, aclosing(watchers.snapshots()) as quick:
        first = await anext(slow)
        handle = engine.submit([make_trajectory(150)], time.monotonic() + FAR)
        numbers = [(await anext(quick)).batch.number for _ in range(4)]
        await asyncio.wrap_future(handle.done)
        late = await anext(slow)
    assert numbers == sorted(set(numbers))
    assert late.batch.number > first.batch.number + 2


async def watch_once(watchers: Watchers, caller: Caller) -> list[Snapshot]:
    """One snapshot; the task holds its place until it is cancelled."""
    with acting_for(caller):
        async with aclosing(watchers.snapshots()) as snapshots:
            async for _ in snapshots:
                await asyncio.sleep(FAR)
    return []


async def test_nobody_takes_the_places_of_others(engine: Engine) -> None:
    watchers = Watchers(Observed(engine))
    greedy, modest = Caller(address="1.1.1.1"), Caller(address="2.2.2.2")
    tasks = [asyncio.create_task(watch_once(watchers, greedy)) for _ in range(MAX_WATCHERS)]
    await until(lambda: len(watchers._news) == MAX_WATCHERS)
    with pytest.raises(Overloaded, match=f"{MAX_WATCHERS} clients watch"):
        await watch_once(watchers, greedy)
    tasks.append(asyncio.create_task(watch_once(watchers, modest)))
    await until(lambda: len(watchers._news) == MAX_WATCHERS + 1)
    with pytest.raises(LimitReached, match="your share"):
        await watch_once(watchers, greedy)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert not watchers._news and observer_of(engine) is None
    assert watchers._places.total == 0


async def test_closing_sends_everybody_away_and_lets_nobody_in(engine: Engine) -> None:
    watchers = Watchers(Observed(engine))
    async with aclosing(watchers.snapshots()) as snapshots:
        await anext(snapshots)
        ending = asyncio.ensure_future(anext(snapshots, None))
        await asyncio.sleep(0)
        watchers.close()
        async with asyncio.timeout(1):
            while await ending is not None:
                ending = asyncio.ensure_future(anext(snapshots, None))
    with pytest.raises(Unavailable, match="stopping"):
        await anext(watchers.snapshots())
    assert observer_of(engine) is None


async def test_a_recorder_that_fails_ends_the_streams_and_no_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watchers = Watchers(Observed(engine))
    async with aclosing(watchers.snapshots()) as snapshots:
        await anext(snapshots)

        def fail(*_: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(Recorder, "_record", fail)
        handle = engine.submit([make_trajectory(20)], time.monotonic() + FAR)
        async with asyncio.timeout(5):
            while await anext(snapshots, None) is not None:
                pass
        await asyncio.wrap_future(handle.done)
    assert "sdbento live batch" in caplog.text
    with pytest.raises(Unavailable, match="log says why"):
        await anext(watchers.snapshots())


async def test_an_engine_that_was_abandoned_cannot_be_watched(engine: Engine) -> None:
    engine.abandon()
    with pytest.raises(Unavailable, match="restarted"):
        await anext(Watchers(Observed(engine)).snapshots())
