"""Webhooks of finished jobs; their host is a thread on loopback."""

from __future__ import annotations

import asyncio
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
from sdbento.jobs import webhooks
from sdbento.jobs.runpod_format import new_job
from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.table import Job, jobs, milliseconds
from sdbento.jobs.webhooks import POSTS_TO_A_HOST, milliseconds_until_next
from sdbento.outbound.http import Answer
from tests.support.hosts import hosting
from tests.support.job_server import SETTINGS, Server, serving, until
from tests.support.jobs import new
from tests.support.listener import Listener
from tests.support.metrics import counted


async def all_posted(server: Server) -> None:
    """Wait until no webhook is due or being posted."""
    await until(lambda: not server.store.webhooks.due(1, 1) and not server.jobs._webhooks._posting)


async def test_a_webhook_receives_what_the_status_route_returns(
    server: Server, listener: Listener
) -> None:
    job_id = await server.submit(webhook=listener.url)
    await server.ended(job_id)
    await until(lambda: listener.heard)
    assert listener.heard == [await server.answer(job_id)]


async def test_a_webhook_is_posted_until_it_is_accepted(server: Server, listener: Listener) -> None:
    before = counted()
    listener.statuses = [500, 302, 503, 404, 500]
    job_id = await server.submit(webhook=listener.url)
    await until(lambda: len(listener.heard) == 6)
    await all_posted(server)
    assert listener.heard == [await server.answer(job_id)] * 6
    grown = counted().since(before)
    assert grown["sdbento_webhooks_total{outcome=refused}"] == 5
    assert grown["sdbento_webhooks_total{outcome=accepted}"] == 1


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
    with server.store._database.snapshot() as connection:
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


def until_next(job: Job, answer: Answer | None) -> int | None:
    return milliseconds_until_next(job, answer, milliseconds())


def test_pauses_grow_for_as_long_as_the_job_is_kept() -> None:
    left, pauses = float(KEPT), list[float]()
    while (pause := until_next(ended(len(pauses), left), None)) is not None:
        pauses.append(pause / 1000)
        left -= pause / 1000
    assert [pause // 10 * 10 for pause in pauses[:2]] == [10, 10]  # RunPod's own
    assert pauses[2:] == sorted(pauses[2:])
    assert len(pauses) == 5
    assert 0 < left < 1.2 * 3600  # another pause would be longer


def test_the_posts_that_runpod_makes_are_made_however_short_the_job_is_kept() -> None:
    given_up = [until_next(ended(posts, 1), None) is None for posts in range(4)]
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
    pause = until_next(ended(2, seconds=86_400), answer)
    if seconds is None:
        assert pause is None
    else:
        assert pause is not None
        assert seconds <= pause / 1000 <= 1.2 * seconds


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
    note, refusals = server.store.webhooks.note, [1, 2, 3]

    def sometimes(*args: Any) -> None:
        if refusals:
            refusals.pop()
            raise OperationalError("UPDATE jobs", None, Exception("the disk is full"))
        note(*args)

    monkeypatch.setattr(server.store.webhooks, "note", sometimes)
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


async def test_a_host_gets_few_posts_of_one_key_at_once_and_others_do_not_wait(
    server: Server, listener: Listener
) -> None:
    listener.hold.clear()
    with acting_for(Caller("slow")):
        slow = [await server.submit(webhook=listener.url) for _ in range(3 * POSTS_TO_A_HOST)]
    await until(lambda: len(server.jobs._webhooks._posting) == POSTS_TO_A_HOST)
    with acting_for(Caller("quick")):
        quick = await server.submit(webhook=listener.url)
    await until(lambda: quick in server.jobs._webhooks._posting)
    assert len(set(slow) & set(server.jobs._webhooks._posting)) == POSTS_TO_A_HOST
    listener.hold.set()
    await until(lambda: {heard["id"] for heard in listener.heard} >= {quick, *slow})


async def test_many_slow_hosts_do_not_delay_the_posts_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "MAX_POSTS", 16)
    async with (
        hosting(monkeypatch, num_addresses=50) as hosts,
        serving(tmp_path) as server,
    ):
        with acting_for(Caller("slow")):
            for i in range(60):
                await server.submit(input={}, webhook=hosts.url(f"slow-{i}.example"))
        await until(lambda: hosts.connected.total() == 8)
        with acting_for(Caller("quick")):
            for i in range(10):
                await server.submit(input={}, webhook=hosts.url(f"quick-{i}.example"))
        await until(lambda: len(hosts.received) == 10)
        assert hosts.connected.total() == 8
        hosts.answer.set()
        await until(lambda: len(hosts.received) == 70)


async def test_a_large_result_is_read_while_it_is_sent(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []
    read = JobStore.part_of_result

    def counting(store: JobStore, job: Job, start: int, num_bytes: int) -> bytes:
        parts.append(start)
        return read(store, job, start, num_bytes)

    monkeypatch.setattr(JobStore, "part_of_result", counting)
    reads = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reads.wait()
        received.append(await reader.readexactly(len(b'{"output": ""}') + len(result)))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    received: list[bytes] = []
    result = b'"' + b"x" * 2**25 + b'"'
    host = await asyncio.start_server(answer, "127.0.0.1")
    port = host.sockets[0].getsockname()[1]
    server.jobs._dispatcher.stop_claiming()  # the job is claimed here
    await server.jobs._dispatching
    store_completed(server.store, result, f"http://127.0.0.1:{port}/")
    await until(lambda: parts)
    await asyncio.sleep(0.3)
    assert max(parts) < len(result) // 2  # what the host does not read is not read here
    reads.set()
    await until(lambda: received)
    host.close()


def store_completed(store: JobStore, result: bytes, webhook: str) -> None:
    store.add(new("large", webhook=webhook))
    (job,) = store.claim(1)
    assert store.complete(job, result)


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
