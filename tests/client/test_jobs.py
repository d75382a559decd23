"""Jobs whose answers a test gives: what a server on `shapes` cannot be made to answer."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from sdbento.client import AsyncClient, Client, jobs
from sdbento.client.errors import NoAnswer, NotUnderstood
from sdbento.client.events import Done, Event
from tests.client.test_transport import DONE, STEP, Wire

BUCKET = "https://bucket.example/a.png?signature=s"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PAUSE", 0.0)


def job(status: str, **fields: Any) -> httpx.Response:
    return httpx.Response(200, json={"id": "a", "status": status, **fields})


def completed(image: str = "AAAA") -> httpx.Response:
    return job("COMPLETED", output=DONE | {"images": [image]}, delayTime=3, executionTime=5)


def stream(status: str, *messages: dict[str, Any]) -> httpx.Response:
    told = [{"output": message} for message in messages]
    return httpx.Response(200, json={"status": status, "stream": told})


def waited(wire: Wire) -> Any:
    with Client(transport=wire.transport, api_key="k") as client:
        return client.jobs.wait("a")


def awaited(wire: Wire) -> Any:
    async def wait() -> Any:
        async with AsyncClient(transport=wire.transport, api_key="k") as client:
            return await client.jobs.wait("a")

    return asyncio.run(wait())


@pytest.mark.parametrize("wait", [waited, awaited])
def test_uploaded_images_are_fetched_without_the_key(wait: Any) -> None:
    wire = Wire(completed(BUCKET), httpx.Response(200, content=b"file"))
    assert wait(wire).image.data == b"file"
    asked, fetched = wire.requests
    assert asked.headers["authorization"] == "Bearer k"
    assert str(fetched.url) == BUCKET
    assert "authorization" not in fetched.headers


@pytest.mark.parametrize("wait", [waited, awaited])
def test_a_server_that_answers_early_is_asked_again(wait: Any) -> None:
    wire = Wire(job("IN_QUEUE"), job("IN_PROGRESS"), completed())
    assert wait(wire).seeds == [7]
    assert {request.url.params["wait"] for request in wire.requests} == {"50000"}


@pytest.mark.parametrize("wait", [waited, awaited])
@pytest.mark.parametrize("url", ["http://[", "https://a b", "http://:x"])
def test_an_address_that_is_none_is_an_error_of_ours(wait: Any, url: str) -> None:
    with pytest.raises(NoAnswer):
        wait(Wire(completed(url), *[httpx.InvalidURL("bad")] * 3))


OUTPUTS: list[Any] = [
    None,
    "x",
    5,
    [],
    ["AAAA"],
    {},
    {"images": "x"},
    DONE | {"images": ["ftp://"]},
]


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_other_outputs_are_named_as_such(output: Any) -> None:
    with pytest.raises(NotUnderstood, match=r"jobs\.status returns it"):
        waited(Wire(job("COMPLETED", output=output)))


def events(wire: Wire) -> list[Event]:
    with Client(transport=wire.transport) as client:
        return list(client.jobs.stream("a"))


def test_the_images_of_a_stream_come_from_the_status() -> None:
    """/stream leaves out an output of more than a megabyte."""
    end = stream("COMPLETED", STEP, {"event": "done", "output": None})
    told = events(Wire(stream("IN_QUEUE"), end, completed()))
    assert [type(event).__name__ for event in told] == ["Step", "Done"]
    assert isinstance(told[-1], Done) and told[-1].generation.seeds == [7]


@pytest.mark.parametrize("answer", [{}, {"status": "COMPLETED"}, {"stream": [5]}, {"stream": [{}]}])
def test_a_stream_of_another_server_is_not_understood(answer: Any) -> None:
    with pytest.raises(NotUnderstood):
        events(Wire(httpx.Response(200, json=answer)))
