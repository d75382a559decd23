"""Answers as errors of the tree, whoever gave them."""

from __future__ import annotations

import email.utils
import time
from typing import Any

import httpx
import pytest

from sdbento.client.errors import TREE, NoAnswer, NotConnected, error_of, error_told, no_answer
from sdbento.errors import (
    DeadlineExceeded,
    NotFound,
    Overloaded,
    SDBentoError,
    TooLarge,
    Unavailable,
)


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_each_error_of_the_server_comes_out_as_it_went_in(kind: type[SDBentoError]) -> None:
    error = kind("a message", param="seed")
    told = error_of(httpx.Response(error.status, json=error.to_body()))
    assert type(told) is kind
    assert (told.message, told.param, told.status) == ("a message", "seed", kind.status)
    assert told.retry_after is None


def test_an_error_of_a_newer_server_keeps_its_type() -> None:
    body = {"error": {"type": "out_of_ink", "message": "m", "param": None}}
    told = error_of(httpx.Response(503, json=body))
    assert type(told) is Unavailable
    assert (told.type, told.status) == ("out_of_ink", 503)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, NotFound),
        (413, TooLarge),
        (429, Overloaded),
        (500, SDBentoError),
        (502, SDBentoError),
        (503, Unavailable),
        (504, DeadlineExceeded),
        (307, SDBentoError),
        (418, SDBentoError),
    ],
)
def test_a_proxys_error_is_one_with_its_status(status: int, kind: type[SDBentoError]) -> None:
    told = error_of(httpx.Response(status, text="<html>sorry</html>"))
    assert type(told) is kind
    assert told.status == status
    assert told.message == f"HTTP {status}: <html>sorry</html>"


BODIES: list[Any] = [None, [], "text", {"error": "text"}, {"error": None}, {"error": {}}, {"a": 1}]


@pytest.mark.parametrize("body", BODIES, ids=str)
def test_bodies_in_other_shapes_are_shown(body: Any) -> None:
    assert error_of(httpx.Response(500, json=body)).message.startswith("HTTP 500: ")


def after(given: str) -> float | None:
    return error_of(httpx.Response(429, headers={"Retry-After": given})).retry_after


def test_retry_after_may_be_seconds_or_a_date() -> None:
    assert after("7") == 7.0
    assert after(email.utils.formatdate(time.time() - 60, usegmt=True)) == 0.0
    in_an_hour = after(email.utils.formatdate(time.time() + 3600, usegmt=True))
    assert in_an_hour is not None and in_an_hour > 3000
    for nonsense in ("", "soon", "-1", "1.5"):
        assert after(nonsense) is None


def test_an_error_event_has_the_status_of_its_type() -> None:
    told = error_told({"type": "deadline_exceeded", "message": "m", "param": "timeout"})
    assert (type(told), told.status, told.param) == (DeadlineExceeded, 504, "timeout")


def test_errors_on_the_way_say_whether_the_server_was_reached() -> None:
    assert type(no_answer(httpx.ConnectError("refused"))) is NotConnected
    assert type(no_answer(httpx.ConnectTimeout(""))) is NotConnected
    broken = no_answer(httpx.ReadTimeout(""))
    assert type(broken) is NoAnswer
    assert (broken.message, broken.status) == ("ReadTimeout", 0)
