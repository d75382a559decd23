"""The line that the log has of a request, and the ids that its answer has, around any app."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from sdbento.doors.bentoml.labels import RouteLabels
from sdbento.doors.http import listings
from sdbento.doors.observability.request_log import RequestLog
from sdbento.errors import DeadlineExceeded
from sdbento.settings import Settings
from sdbento.telemetry.request import note_error, present_request

LABELS = RouteLabels([listings.router], ["/generate"])


def around(app: ASGIApp, **settings: Any) -> TestClient:
    log = RequestLog(app, LABELS, lambda: Settings(**settings))
    return TestClient(log, raise_server_exceptions=False)


async def answering(scope: Scope, receive: Receive, send: Send) -> None:
    status = int(Request(scope).query_params.get("status", "200"))
    await PlainTextResponse("text", status)(scope, receive, send)


class Lines(logging.Handler):
    """Those that have been written, as their fields."""

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[int] = []
        self.told: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.levels.append(record.levelno)
        self.told.append(record.__dict__["fields"])


@pytest.fixture
def lines() -> Iterator[Lines]:
    lines, logger = Lines(), logging.getLogger("sdbento.access")
    logger.addHandler(lines)
    logger.setLevel(logging.DEBUG)
    yield lines
    logger.removeHandler(lines)
    logger.setLevel(logging.NOTSET)


def test_the_id_of_the_client_is_answered_or_else_a_new_one() -> None:
    client = around(answering)
    assert client.get("/models", headers={"X-Request-ID": "mine.1"}).headers["X-Request-ID"] == (
        "mine.1"
    )
    made = client.get("/models", headers={"X-Request-ID": "not mine"}).headers["X-Request-ID"]
    assert len(made) == 32


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "ok"), (204, "ok"), (404, "invalid"), (499, "cancelled"), (500, "failed")],
)
def test_an_answer_whose_error_nobody_has_noted_is_judged_by_its_status(
    lines: Lines, status: int, outcome: str
) -> None:
    around(answering).post(f"/generate?status={status}")
    (told,) = lines.told
    assert (told["method"], told["route"]) == ("POST", "/generate")
    assert (told["status"], told["outcome"]) == (status, outcome)
    assert "path" not in told and told["seconds"] >= 0


def test_a_failure_after_the_answer_has_begun_is_told(lines: Lines) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        note_error(DeadlineExceeded("too late"))
        await answering(scope, receive, send)

    around(app).post("/generate")
    told = lines.told[0]
    assert (told["status"], told["outcome"]) == (200, "timeout")
    assert told["error"] == "deadline_exceeded"


def test_a_bug_and_a_client_that_has_gone_are_told(lines: Lines) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        return

    around(failing).post("/generate")
    around(silent).post("/generate")
    told = [(line["status"], line["outcome"]) for line in lines.told]
    assert told == [(500, "failed"), (499, "cancelled")]


def test_probes_are_told_at_debug_only_and_only_paths_without_route_as_they_are(
    lines: Lines,
) -> None:
    client = around(answering)
    client.get("/livez")
    client.get("/wp-login.php")
    assert lines.levels == [logging.DEBUG, logging.INFO]
    assert [line.get("path") for line in lines.told] == [None, "/wp-login.php"]


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_told_where_they_are_asked_for(lines: Lines, log_prompts: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        facts = present_request()
        assert facts is not None
        facts.add_contents(["a red circle"], ["https://host/picture.png"])
        await Response()(scope, receive, send)

    around(app, log_prompts=log_prompts).post("/generate")
    told = lines.told[0]
    contents = {"prompts": ["a red circle"], "image_urls": ["https://host/picture.png"]}
    shown = {name: told[name] for name in contents if name in told}
    assert shown == (contents if log_prompts else {})
