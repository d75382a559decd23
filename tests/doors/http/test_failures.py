"""What a client reads when a handler, or the framework below it, fails."""

from __future__ import annotations

import json

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from sdbento.doors.http.failures import guarded
from sdbento.doors.http.guard import Guard
from sdbento.errors import Overloaded, SDBentoError
from sdbento.settings import Settings

ERRORS: dict[str, Exception] = {
    "full": Overloaded("the queue is full", retry_after=2.2),
    "soon": Overloaded("the queue is full", retry_after=0.01),
    "bug": ZeroDivisionError("secret internals"),
}


@guarded
async def fails(request: Request) -> Response:
    raise ERRORS[request.path_params["how"]]


async def refuses(request: Request) -> Response:
    """Refuses the request with a bare error, as a framework does."""
    return PlainTextResponse("not now", int(request.path_params["status"]))


async def refuses_in_json(request: Request) -> Response:
    return JSONResponse({"detail": "mine"}, 418)


@pytest.fixture
def client() -> TestClient:
    routes = [
        Route("/fails/{how}", fails),
        Route("/refuses/{status}", refuses),
        Route("/json", refuses_in_json),
    ]
    return TestClient(Guard(Starlette(routes=routes), Settings, {}))


@pytest.mark.parametrize(("how", "seconds"), [("full", "3"), ("soon", "1")])
def test_the_error_of_a_handler_is_the_answer(client: TestClient, how: str, seconds: str) -> None:
    response = client.get(f"/fails/{how}")
    assert response.status_code == 429
    assert response.headers["retry-after"] == seconds
    error = {"type": "queue_full", "message": "the queue is full", "param": None}
    assert response.json() == {"error": error}


def test_a_bug_shows_an_id_and_the_log_has_the_rest(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    response = client.get("/fails/bug")
    assert response.status_code == 500
    message = response.json()["error"]["message"]
    assert "secret" not in response.text
    assert message in caplog.text
    assert "ZeroDivisionError: secret internals" in caplog.text


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "malformed_request"),
        (415, "malformed_request"),
        (422, "invalid_parameter"),
        (500, SDBentoError.type),
        (503, "unavailable"),
    ],
)
def test_a_bare_error_of_the_framework_gets_the_one_shape(
    client: TestClient, status: int, kind: str
) -> None:
    response = client.get(f"/refuses/{status}")
    assert response.status_code == status
    assert response.json() == {"error": {"type": kind, "message": "not now", "param": None}}


def test_an_error_that_is_json_already_passes_on_other_paths(client: TestClient) -> None:
    response = client.get("/json")
    assert (response.status_code, json.loads(response.content)) == (418, {"detail": "mine"})


def test_a_missing_route_and_a_wrong_method_get_different_messages(client: TestClient) -> None:
    assert client.get("/nowhere").json()["error"]["message"].startswith("there is no /nowhere")
    response = client.delete("/json")
    assert response.status_code == 405
    message = response.json()["error"]["message"]
    assert message == f"/json takes {response.headers['allow']}, not DELETE"
    assert "GET" in message
