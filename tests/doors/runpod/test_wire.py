"""Taking jobs and posting results, against a server that misbehaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from runpod.http_client import AsyncClientSession, TooManyRequests

from sdbento.doors.runpod import wire
from sdbento.errors import SDBentoError
from sdbento.jobs.formats.native import parse_input

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[str]:
    """The URL of a server whose requests are all answered by `handler`."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


async def take(answer: web.Response, monkeypatch: pytest.MonkeyPatch, num_jobs: int = 3) -> Any:
    """The jobs taken from a platform that gives this answer."""

    async def handler(_: web.Request) -> web.Response:
        return answer

    async with served(handler) as url, AsyncClientSession() as session:
        monkeypatch.setattr(wire, "_job_get_url", lambda _: url)
        return await wire.take(session, num_jobs)


JOB = {"id": "a", "input": {"prompt": "x"}}


@pytest.mark.parametrize(
    ("answer", "jobs"),
    [
        ({"status": 204}, []),
        ({"status": 400}, []),
        ({"text": ""}, []),
        ({"text": "[]"}, []),
        ({"text": json.dumps(JOB)}, [JOB]),
        ({"text": json.dumps([JOB, JOB])}, [JOB, JOB]),
        ({"text": "null"}, [None]),
    ],
)
async def test_the_platform_may_send_one_job_a_list_or_none(
    answer: dict[str, Any], jobs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await take(web.Response(**answer), monkeypatch) == jobs


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"status": 429}, TooManyRequests),
        ({"status": 500}, aiohttp.ClientResponseError),
        ({"text": "<html>"}, ValueError),
    ],
)
async def test_an_unusable_answer_is_an_error(
    answer: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error):
        await take(web.Response(**answer), monkeypatch)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


OBJECTS = '{"]": ' * 5000 + "1" + "}" * 5000
TWO_DEEP = "[" * 500 + nested(5000) + ", 1, " + nested(300) + "]" * 500


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("z", nested(5000)),
        ("z", OBJECTS),
        ("z", TWO_DEEP),
        ("seed", "1" * 5000),
        ("seed", "1" * 4000),
    ],
    ids=["lists", "objects", "two", "5000 digits", "4000 digits"],
)
def test_one_bad_job_does_not_cost_the_others_of_its_batch(field: str, value: str) -> None:
    given = f'{{"prompt": "x", "{field}": {value}}}'
    beside = json.dumps({"id": "b", "input": {"prompt": 'brackets ]} and \\" in [[ a text'}})
    jobs = wire.read(f'[{beside}, {{"id": "bad", "input": {given}}}, {beside}]')
    assert [job["id"] for job in jobs] == ["b", "bad", "b"]
    assert jobs[0] == jobs[2] == json.loads(beside)
    with pytest.raises(SDBentoError):
        parse_input(jobs[1]["input"])


class Listener:
    """Answers posts as given, then with 200; keeps what it received."""

    def __init__(self, *answers: int | str) -> None:
        self.answers = list(answers)
        self.heard: list[tuple[str, str, str]] = []  # path, the job's id in the header, body

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.text()
        self.heard.append((request.path, request.headers["X-Request-ID"], body))
        answer = self.answers.pop(0) if self.answers else 200
        assert request.transport is not None
        if answer == "drop":
            request.transport.abort()
        elif answer == "garbage":
            assert isinstance(request.transport, asyncio.Transport)
            request.transport.write(b"what?\r\n\r\n")
            request.transport.close()
        return web.Response(status=answer if isinstance(answer, int) else 500)


async def post(session: aiohttp.ClientSession, url: str, job_id: str) -> None:
    """Post a result as the SDK does."""
    session.headers["X-Request-ID"] = job_id
    await wire.post(session, url + job_id, f"result of {job_id}")


@pytest.fixture
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "LONGEST_PAUSE", 0.05)


@pytest.mark.usefixtures("_short_pauses")
@pytest.mark.parametrize("answer", [500, 502, 429, 408, "drop", "garbage"])
async def test_an_unacknowledged_result_is_posted_again(answer: int | str) -> None:
    listener = Listener(answer, answer)
    async with served(listener.answer) as url, AsyncClientSession() as session:
        await post(session, url, "a")
    assert listener.heard == [("/a", "a", "result of a")] * 3


@pytest.mark.usefixtures("_short_pauses")
@pytest.mark.parametrize("status", [400, 404, 409])
async def test_a_refused_result_is_not_posted_again(status: int) -> None:
    listener = Listener(status)
    async with served(listener.answer) as url, AsyncClientSession() as session:
        with pytest.raises(aiohttp.ClientResponseError):
            await post(session, url, "a")
    assert len(listener.heard) == 1


@pytest.mark.usefixtures("_short_pauses")
async def test_results_that_are_posted_again_keep_their_jobs_id() -> None:
    listener = Listener(*[500] * 12)
    async with served(listener.answer) as url, AsyncClientSession() as session:
        await asyncio.gather(*(post(session, url, str(i)) for i in range(10)))
    assert len(listener.heard) == 22
    assert all(path == f"/{job_id}" for path, job_id, _ in listener.heard)


@pytest.mark.usefixtures("_short_pauses")
async def test_a_platform_that_never_answers_is_an_error_that_the_sdk_expects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(wire, "POST_SECONDS", 0.05)
    monkeypatch.setattr(wire, "POST_ATTEMPTS", 2)
    async with served(never) as url, AsyncClientSession() as session:
        with pytest.raises(aiohttp.ClientError, match="no answer within"):
            await post(session, url, "a")
