"""Background tasks that are watched, and calls on thread pools."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from sdbento.background import Problem, ThreadPool, start_task


async def forever() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise KeyError("a bug")


async def test_a_task_that_dies_is_logged_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    reported = asyncio.Event()
    task = start_task(fail(), "tidy", reported.set)
    await asyncio.wait_for(reported.wait(), 5)
    assert task.done()
    [record] = caplog.records
    assert record.levelname == "ERROR" and "'tidy' died" in record.getMessage()
    assert record.exc_info is not None and "a bug" in caplog.text


async def test_a_dying_task_is_logged_without_anyone_to_report_to(
    caplog: pytest.LogCaptureFixture,
) -> None:
    await asyncio.wait({start_task(fail(), "tidy")})
    await asyncio.sleep(0)
    assert "'tidy' died" in caplog.text


async def test_a_task_that_returns_or_is_cancelled_has_not_died(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reported = asyncio.Event()
    returning = start_task(asyncio.sleep(0, "done"), "returns", reported.set)
    cancelled = start_task(forever(), "waits", reported.set)
    assert await returning == "done"
    cancelled.cancel()
    await asyncio.wait({cancelled})
    await asyncio.sleep(0)
    assert not reported.is_set() and not caplog.records
    assert (returning.get_name(), cancelled.get_name()) == ("returns", "waits")


async def test_a_thread_pool_gives_back_what_the_function_returns_or_raises() -> None:
    with ThreadPool(1, "sdbento-test") as pool:
        thread = await pool.run(threading.current_thread)
        assert thread.name.startswith("sdbento-test")
        assert await pool.run(int, "ff", base=16) == 255
        with pytest.raises(ValueError, match="invalid literal"):
            await pool.run(int, "x")


async def test_as_many_calls_run_at_once_as_there_are_threads() -> None:
    meeting = threading.Barrier(2)
    with ThreadPool(2, "sdbento-test") as pool:
        async with asyncio.timeout(5):
            await asyncio.gather(*(pool.run(meeting.wait, 5) for _ in range(2)))


def test_a_problem_is_logged_once_until_it_is_another_or_solved(
    caplog: pytest.LogCaptureFixture,
) -> None:
    problem = Problem(logging.getLogger("any"))
    for text in ("full", "full", "away", "full", "full"):
        problem.note(text)
    problem.solved()
    problem.note("full")
    assert [record.message for record in caplog.records] == ["full", "away", "full", "full"]
