"""The warning that a server without keys can be reached from elsewhere."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest

from sdbento.doors.http.exposure import decide_any_model, is_local, warn_if_open
from sdbento.settings import Settings


def listens_on(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    sockets = [
        SimpleNamespace(laddr=SimpleNamespace(ip=host), status=psutil.CONN_LISTEN) for host in hosts
    ]
    monkeypatch.setattr(psutil.Process, "net_connections", lambda *_: sockets)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_a_server_for_others_without_a_key_says_so(
    host: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listens_on(monkeypatch, "127.0.0.1", host)
    warn_if_open(Settings())
    assert f"listens on {host} without a key" in caplog.text
    assert not is_local(host)


def test_nothing_is_said_with_a_key_or_on_loopback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listens_on(monkeypatch, "127.0.0.1", "::1", "127.0.1.1")
    warn_if_open(Settings())
    listens_on(monkeypatch, "0.0.0.0")
    warn_if_open(Settings.model_validate({"api_key": "x"}))
    assert not caplog.text


def test_the_sockets_of_this_process_are_found(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)):
        warn_if_open(Settings())
    assert not caplog.text


@pytest.mark.parametrize(
    ("hosts", "allowed"),
    [
        (["127.0.0.1"], True),
        (["127.0.0.1", "::1"], True),
        (["0.0.0.0"], False),
        (["127.0.0.1", "192.0.2.7"], False),
        ([], False),  # another process listens for it
    ],
)
def test_any_model_is_allowed_where_only_this_machine_can_ask(
    hosts: list[str],
    allowed: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    listens_on(monkeypatch, *hosts)
    caplog.set_level("INFO")
    assert decide_any_model(Settings()).allow_any_model is allowed
    assert "SDBENTO_ALLOW_ANY_MODEL" in caplog.text
    assert all(host in caplog.text for host in hosts)
    for given in (True, False):
        settings = Settings(allow_any_model=given)
        assert decide_any_model(settings) is settings


def test_an_empty_key_is_refused_rather_than_taken_for_none() -> None:
    for key in ("", " \n"):
        with pytest.raises(ValueError, match="must not be empty"):
            Settings.model_validate({"api_key": key})
