"""The job loop, which changes that of RunPod's SDK, without a platform."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from sdbento.doors.runpod import loop as runpod_loop
from sdbento.doors.runpod import wire
from sdbento.doors.runpod.loop import DrainingScaler
from sdbento.doors.runpod.wire import WireJob


@pytest.fixture(autouse=True)
def _no_job_is_left() -> Iterator[None]:
    """The SDK keeps one set of jobs for the whole process."""
    yield
    DrainingScaler({}).job_progress.clear()


def taken(monkeypatch: pytest.MonkeyPatch, *answers: list[Any] | Exception) -> list[int]:
    """Let the platform give these answers, then none; lists how many jobs each poll asked for."""
    asked: list[int] = []

    async def take(_: object, num_jobs: int) -> list[Any]:
        asked.append(num_jobs)
        if len(asked) > len(answers):
            await asyncio.Event().wait()
        answer = answers[len(asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(wire, "take", take)
    return asked


async def test_an_open_request_for_jobs_does_not_delay_the_end_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = taken(monkeypatch)
    monkeypatch.setattr(DrainingScaler, "drain_seconds", 0.2)
    scaler = DrainingScaler({"concurrency_modifier": lambda _: 5})
    running = asyncio.create_task(scaler.run())
    await asyncio.sleep(0.2)
    assert asked == [5]
    scaler.drain()
    await asyncio.wait_for(running, 5)
    assert asked == [5]


async def test_jobs_that_cannot_be_run_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad: list[Any] = [{"input": {}}, None, {"id": 5}, {"id": ""}, {"id": "line\nfeed"}]
    good = [{"id": "a", "input": {}, "self": 1}, {"id": "b,c"}]
    taken(monkeypatch, [good[0], *bad, {"id": "under way"}, {"id": "a"}, good[1]])
    scaler = DrainingScaler({})
    scaler.job_progress.add("under way")
    assert await scaler._take(None, 9) == [{"id": "a", "input": {}}, {"id": "b,c"}]  # type: ignore[arg-type]
    assert caplog.text.count("without a usable id") == len(bad)
    assert "job a came again" in caplog.text
    assert "job under way came again" in caplog.text


async def test_an_unreachable_platform_is_polled_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error = aiohttp.ClientConnectionError("refused")
    taken(monkeypatch, error, ValueError("not JSON"), error, [{"id": "a"}], error)
    rests: list[float] = []

    async def rest(_: DrainingScaler, seconds: float) -> None:
        rests.append(seconds)

    monkeypatch.setattr(DrainingScaler, "_rest", rest)
    monkeypatch.setattr(runpod_loop, "LONGEST_PAUSE", 1.5)
    scaler = DrainingScaler({})
    for _ in range(5):
        await scaler._take(None, 1)  # type: ignore[arg-type]
    assert rests == [0.5, 1.0, 1.5, 0.5]
    assert "no jobs can be taken now: ClientConnectionError: refused" in caplog.text


async def test_a_platform_that_answers_empty_at_once_is_polled_with_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = taken(monkeypatch, *[[] for _ in range(1000)])
    scaler = DrainingScaler({})
    running = asyncio.create_task(scaler.run())
    await asyncio.sleep(0.5)
    scaler.drain()
    await asyncio.wait_for(running, 5)
    assert 0 < len(asked) <= 6


async def test_a_job_that_is_stopped_before_its_turn_is_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []
    gate = asyncio.Event()

    async def handler(job: WireJob) -> list[str]:
        ran.append(job["id"])
        await gate.wait()
        return []

    async def post(*_: object) -> None:
        """No platform receives it."""

    taken(monkeypatch, [{"id": name, "input": {}} for name in "abcd"])
    monkeypatch.setattr("runpod.serverless.modules.rp_http._transmit", post)
    scaler = DrainingScaler({"handler": handler, "concurrency_modifier": lambda _: 2})
    running = asyncio.create_task(scaler.run())
    while len(ran) < 2:
        await asyncio.sleep(0.01)
    assert await scaler.stop_job("c")  # in the SDK's queue
    assert await scaler.stop_job("b")  # running
    assert not await scaler.stop_job("nobody's")
    gate.set()
    scaler.drain()
    await asyncio.wait_for(running, 5)
    assert ran == ["a", "b", "d"]
    assert not scaler.job_progress
