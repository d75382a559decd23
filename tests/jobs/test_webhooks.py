"""Webhooks of finished jobs; their host is a thread on loopback."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from sdbento.jobs.runpod_format import new_job
from sdbento.jobs.store import JobStore
from tests.support.job_server import SETTINGS, Server, serving, until
from tests.support.listener import Listener


async def all_posted(server: Server) -> None:
    """Wait until no webhook is due or being posted."""
    await until(lambda: not server.store.due_webhooks(1) and not server.jobs._webhooks._posting)


async def test_a_webhook_receives_what_the_status_route_returns(
    server: Server, listener: Listener
) -> None:
    job_id = await server.submit(webhook=listener.url)
    await server.ended(job_id)
    await until(lambda: listener.heard)
    assert listener.heard == [await server.answer(job_id)]


async def test_a_webhook_is_tried_three_times(server: Server, listener: Listener) -> None:
    listener.statuses = [500, 302]
    job_id = await server.submit(webhook=listener.url)
    await until(lambda: len(listener.heard) == 3)
    await all_posted(server)
    listener.statuses = [500] * 9
    await server.submit(webhook=listener.url)
    await until(lambda: len(listener.heard) == 6)
    await asyncio.sleep(0.2)
    assert len(listener.heard) == 6
    assert listener.heard[0] == listener.heard[2] == await server.answer(job_id)


async def test_a_webhook_is_posted_once_though_that_cannot_be_recorded_at_first(
    server: Server, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, refusals = server.store.note_webhook, [1, 2, 3]

    def sometimes(*args: Any) -> None:
        if refusals:
            refusals.pop()
            raise OperationalError("UPDATE jobs", None, Exception("the disk is full"))
        note(*args)

    monkeypatch.setattr(server.store, "note_webhook", sometimes)
    await server.submit(webhook=listener.url)
    await until(lambda: not refusals)
    await all_posted(server)
    assert len(listener.heard) == 1


async def test_an_unsent_webhook_is_posted_after_a_restart(
    tmp_path: Path, listener: Listener
) -> None:
    store = JobStore(tmp_path)
    body = {"input": {"prompt": "x"}, "webhook": listener.url}
    new = new_job(json.dumps(body).encode(), SETTINGS, sync=False)
    store.add(new)
    (job,) = store.claim(1)
    store.complete(job, b'["picture"]')
    store.close()  # as if the process were killed here
    async with serving(tmp_path) as server:
        await until(lambda: listener.heard)
        assert listener.heard[0]["output"] == ["picture"]
        assert server.app.begun == []


async def test_failures_and_cancellations_are_posted_to_the_webhook(
    server: Server, listener: Listener
) -> None:
    await server.submit(input={}, webhook=listener.url)
    await until(lambda: len(listener.heard) == 1)
    job_id = await server.submit("slow", webhook=listener.url)
    await server.jobs.cancel(job_id)
    await until(lambda: len(listener.heard) == 2)
    assert [heard["status"] for heard in listener.heard] == ["FAILED", "CANCELLED"]
    assert listener.heard[0]["error"] == "prompt is required"
