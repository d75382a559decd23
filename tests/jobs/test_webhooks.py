"""Webhooks of finished jobs; their host is a thread on loopback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from standardwebhooks import Webhook, WebhookVerificationError

from sdbento.access.caller import Caller, acting_for
from sdbento.errors import GenerationFailed
from sdbento.jobs.runpod_format import new_job
from sdbento.jobs.store import JobStore
from sdbento.jobs.table import Job, jobs, milliseconds
from sdbento.jobs.webhooks import MAX_POSTS, milliseconds_until_next
from sdbento.outbound import Answer
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


async def test_a_webhook_is_posted_until_it_is_accepted(server: Server, listener: Listener) -> None:
    listener.statuses = [500, 302, 503, 404, 500]
    job_id = await server.submit(webhook=listener.url)
    await until(lambda: len(listener.heard) == 6)
    await all_posted(server)
    assert listener.heard == [await server.answer(job_id)] * 6


async def test_a_webhook_that_is_gone_is_not_posted_again(
    server: Server, listener: Listener
) -> None:
    listener.statuses = [500, 410]
    await server.submit(webhook=listener.url)
    await until(lambda: len(listener.heard) == 2)
    await until(lambda: not server.jobs._webhooks._posting)
    assert waiting(server) == []


async def test_a_host_may_ask_for_time(server: Server, listener: Listener) -> None:
    listener.statuses, listener.retry_after = [429], "60"
    job_id = await server.submit(webhook=listener.url)
    await until(lambda: listener.heard)
    await until(lambda: not server.jobs._webhooks._posting)
    [(waits, due)] = waiting(server)
    assert waits == job_id
    assert 50_000 < due - milliseconds() <= 60_000


def waiting(server: Server) -> list[tuple[str, int]]:
    """The jobs whose webhook is to be posted again, and when."""
    with server.store._snapshot() as connection:
        rows = connection.execute(select(jobs.c.id, jobs.c.webhook_due)).all()
    return [(row.id, row.webhook_due) for row in rows if row.webhook_due is not None]


KEPT = 1800  # seconds for which jobs are kept by default


def ended(webhook_posts: int, seconds: float = KEPT) -> Job:
    """A job that is kept for so many more seconds."""
    now = milliseconds()
    return Job(
        id="a", status="COMPLETED", input=None, run=1, created=now, started=now, finished=now,
        expires=now, ttl=0, execution_timeout=0, size=0, error=None, webhook="https://a.example",
        webhook_posts=webhook_posts, delete_after=now + round(1000 * seconds), s3_config=None,
        key_name=None,
        address=None,
    )  # fmt: skip


def test_pauses_grow_for_as_long_as_the_job_is_kept() -> None:
    left, pauses = float(KEPT), list[float]()
    while (pause := milliseconds_until_next(ended(len(pauses), left), None)) is not None:
        pauses.append(pause / 1000)
        left -= pause / 1000
    assert [pause // 10 * 10 for pause in pauses[:2]] == [10, 10]  # RunPod's own
    assert pauses[2:] == sorted(pauses[2:])
    assert len(pauses) == 5
    assert 0 < left < 1.2 * 3600  # another pause would be longer


def test_the_posts_that_runpod_makes_are_made_however_short_the_job_is_kept() -> None:
    given_up = [milliseconds_until_next(ended(posts, 1), None) is None for posts in range(4)]
    assert given_up == [False, False, True, True]


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        (Answer(204, None), None),
        (Answer(410, 5), None),
        (Answer(503, 5), 60),  # less than the pause itself
        (Answer(503, 700), 700),
        (Answer(503, None), 60),
        (Answer(429, 10**8), 3600),  # not for ever
        (Answer(500, 700), 60),
        (Answer(301, None), 60),
    ],
)
def test_the_answer_decides_when_to_post_again(answer: Answer, seconds: float | None) -> None:
    until_next = milliseconds_until_next(ended(2, seconds=86_400), answer)
    if seconds is None:
        assert until_next is None
    else:
        assert until_next is not None
        assert seconds <= until_next / 1000 <= 1.2 * seconds


SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


async def test_a_receiver_can_verify_a_webhook(tmp_path: Path, listener: Listener) -> None:
    settings = SETTINGS.model_copy(update={"webhook_secret": SecretStr(SECRET)})
    listener.statuses = [500]
    async with serving(tmp_path, settings=settings) as server:
        job_id = await server.submit(webhook=listener.url)
        await until(lambda: len(listener.posts) == 2)
        answer = await server.answer(job_id)
    for headers, body in listener.posts:
        assert Webhook(SECRET).verify(body, headers) == answer
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(body.replace(b"COMPLETED", b"CANCELLED"), headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET[:-4] + "AAAA").verify(body, headers)
    assert len({headers["webhook-id"] for headers, _ in listener.posts}) == 1


async def test_each_end_of_a_job_has_an_id_of_its_own(tmp_path: Path, listener: Listener) -> None:
    settings = SETTINGS.model_copy(update={"webhook_secret": SecretStr(SECRET)})
    async with serving(tmp_path, settings=settings) as server:
        server.app.failures["x"] = [GenerationFailed("not this time")]
        job_id = await server.submit("x", webhook=listener.url)
        await until(lambda: len(listener.posts) == 1)
        await server.jobs.retry(job_id)
        await until(lambda: len(listener.posts) == 2)
    assert len({headers["webhook-id"] for headers, _ in listener.posts}) == 2


async def test_without_a_key_nothing_is_signed(server: Server, listener: Listener) -> None:
    await server.submit(webhook=listener.url)
    await until(lambda: listener.posts)
    assert not [name for name in listener.posts[0][0] if name.lower().startswith("webhook")]


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


async def test_the_slow_host_of_one_key_does_not_keep_the_posts_of_another_waiting(
    server: Server, listener: Listener
) -> None:
    listener.hold.clear()
    with acting_for(Caller("slow")):
        slow = [await server.submit(webhook=listener.url) for _ in range(2 * MAX_POSTS)]
    await until(lambda: len(server.jobs._webhooks._posting) >= MAX_POSTS // 2)
    with acting_for(Caller("quick")):
        quick = await server.submit(webhook=listener.url)
    await until(lambda: quick in server.jobs._webhooks._posting)
    assert len(set(slow) & set(server.jobs._webhooks._posting)) <= MAX_POSTS // 2
    listener.hold.set()
    await until(lambda: {heard["id"] for heard in listener.heard} >= {quick, *slow})


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
