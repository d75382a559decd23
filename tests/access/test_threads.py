"""Threads that keys share: who has a share waits, and others do not wait for that."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from sdbento.access.caller import Caller, acting_for, current_caller
from sdbento.access.threads import SharedThreads

SOON = 10.0  # seconds that a busy machine may take for what should be instant
ALICE, BOB = Caller("alice", shares=True), Caller("bob", shares=True)


class SlowHost:
    """Keeps every call until it may `answer`."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._lock = threading.Lock()
        self._answer = threading.Semaphore(0)

    def __call__(self) -> str | None:
        with self._lock:
            self.num_calls += 1
        assert self._answer.acquire(timeout=SOON)
        return current_caller().name

    def answer(self, num_calls: int) -> None:
        self._answer.release(num_calls)

    async def has_got(self, num_calls: int) -> None:
        async with asyncio.timeout(SOON):
            while self.num_calls < num_calls:
                await asyncio.sleep(0.001)


@pytest.fixture
def host() -> SlowHost:
    return SlowHost()


@pytest.fixture
def pool(host: SlowHost) -> Iterator[SharedThreads]:
    with SharedThreads(4, "sdbento-test") as pool:
        yield pool
        host.answer(100)


async def started(
    pool: SharedThreads, host: SlowHost, caller: Caller, num_calls: int
) -> list[asyncio.Task[str | None]]:
    with acting_for(caller):
        tasks = [asyncio.create_task(pool.run(host)) for _ in range(num_calls)]
    await asyncio.sleep(0)
    return tasks


async def test_a_key_gets_half_of_the_threads_and_the_next_need_not_wait(
    pool: SharedThreads, host: SlowHost
) -> None:
    calls = await started(pool, host, ALICE, 20)
    await host.has_got(2)
    with acting_for(BOB):
        assert await asyncio.wait_for(pool.run(lambda: current_caller().name), SOON) == "bob"
    assert host.num_calls == 2
    host.answer(20)
    assert await asyncio.gather(*calls) == ["alice"] * 20


async def test_a_call_that_was_given_up_keeps_its_place_until_its_thread_is_free(
    pool: SharedThreads, host: SlowHost
) -> None:
    for task in await started(pool, host, ALICE, 20):
        task.cancel()
    await started(pool, host, ALICE, 20)
    await host.has_got(2)
    with acting_for(BOB):
        assert await asyncio.wait_for(pool.run(lambda: current_caller().name), SOON) == "bob"
    assert host.num_calls == 2


async def test_the_only_key_may_have_all_threads(pool: SharedThreads, host: SlowHost) -> None:
    calls = await started(pool, host, Caller("alice"), 4)
    await host.has_got(4)
    host.answer(4)
    await asyncio.gather(*calls)


async def test_calls_that_wait_begin_in_the_order_in_which_they_came(
    pool: SharedThreads, host: SlowHost
) -> None:
    caller, begun = Caller("alice"), list[int]()
    calls = await started(pool, host, caller, 4)
    await host.has_got(4)
    with acting_for(caller):
        waiting = [asyncio.create_task(pool.run(begun.append, i)) for i in range(20)]
        await asyncio.sleep(0)
        waiting[3].cancel()
        host.answer(1)
        await asyncio.gather(*waiting, return_exceptions=True)
    assert begun == [i for i in range(20) if i != 3]
    host.answer(3)
    await asyncio.gather(*calls)
