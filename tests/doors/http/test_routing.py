"""What all doors have in common: how a route of one reads its body, and how it fails."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import Query
from pydantic import BaseModel
from starlette.testclient import TestClient

from sdbento.doors.http.guard import Guard
from sdbento.doors.http.routing import TheApp, door, mounted
from sdbento.doors.network.parsers import LARGE_BODY
from sdbento.errors import Overloaded
from sdbento.settings import Settings
from tests.support.server import assert_error

router = door("Tests")


class Body(BaseModel):
    text: str
    count: int = 1


class Echo(BaseModel):
    text: str
    count: int


@router.post("/echo")
async def echo(body: Body) -> Echo:
    return Echo(text=body.text, count=body.count)


@router.get("/settings")
async def settings(app: TheApp) -> str:
    return app.settings.sd_model


@router.post("/settings")
async def change() -> None: ...


@router.get("/twice")
async def twice(number: int = Query(ge=1)) -> int:
    return 2 * number


@router.post("/full")
async def full() -> None:
    raise Overloaded("the queue is full", retry_after=3)


class FakeApp:
    settings = Settings(sd_model="shapes")


@pytest.fixture
def client() -> TestClient:
    routes = mounted(router)
    routes.state.app = FakeApp()
    return TestClient(Guard(routes, Settings, {}))


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain", ""]
)
@pytest.mark.parametrize("length", [3, LARGE_BODY])
def test_a_body_is_json_whatever_is_said_of_it(client: Any, content_type: str, length: int) -> None:
    text = "x" * length
    headers = {"content-type": content_type} if content_type else {}
    response = client.post("/echo", content=f'{{"text": "{text}"}}', headers=headers)
    assert response.json() == {"text": text, "count": 1}


@pytest.mark.parametrize(
    ("body", "status", "words", "param"),
    [
        (b'{"count": 2}', 422, "text is required", "text"),
        (b'{"text": "a", "count": "x"}', 422, "count should be a valid integer", "count"),
        (b"", 400, "must be a JSON object", None),
        (b"[1]", 400, "must be a JSON object", None),
        (b'{"text": ', 400, "the body is not JSON", None),
        (b"\xff", 400, "the body is not JSON", None),
        ('{"text": "a"}'.encode("utf-16"), 400, "the body is not JSON", None),
        (b"[" * 100_000, 413, "the body may have at most 20000 keys and values", None),
        (b"[" * 10_000, 413, "the body may be nested at most 64 deep", None),
        (b'{"count": ' + b"9" * 5000 + b"}", 400, "the body has a number of thousands", None),
    ],
)
def test_a_bad_body_is_answered_in_one_sentence(
    client: Any, body: bytes, status: int, words: str, param: str | None
) -> None:
    assert_error(client.post("/echo", content=body), status, words, param=param)


def test_a_bad_query_is_named(client: Any) -> None:
    assert client.get("/twice?number=2").json() == 4
    assert_error(client.get("/twice?number=0"), 422, "number", param="number")
    assert_error(client.get("/twice"), 422, "number is required", param="number")


def test_a_handler_is_given_the_app(client: Any) -> None:
    assert client.get("/settings").json() == "shapes"


def test_what_a_handler_raises_is_the_answer(client: Any) -> None:
    response = client.post("/full")
    assert_error(response, 429, "the queue is full")
    assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/echo", 405), ("GET", "/nothing", 404)]
)
def test_where_no_route_fits(client: Any, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert_error(response, status, path)


def test_all_methods_of_a_path_are_named(client: Any) -> None:
    assert client.options("/settings").headers["allow"] == "GET, POST, OPTIONS"
    response = client.put("/settings")
    assert response.headers["allow"] == "GET, POST"
    assert_error(response, 405, "/settings takes GET, POST, not PUT")
    assert client.options("/twice").headers["allow"] == "GET, OPTIONS"
