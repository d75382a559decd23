"""What the command line prints, and when the log stays silent."""

from __future__ import annotations

import logging

import pytest

from sdbento.doors.cli.output import keep_quiet, say
from sdbento.settings import Settings


def test_a_line_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("no GPU here")
    assert capsys.readouterr() == ("", "sdbento: no GPU here\n")


def test_the_log_is_shown_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(logging, "disable", lambda level: called.append(f"disable {level}"))
    monkeypatch.setattr(logging, "basicConfig", lambda *, level: called.append(f"show {level}"))
    keep_quiet(Settings())
    keep_quiet(Settings(log_level="DEBUG"))
    assert called == [f"disable {logging.ERROR}", f"show {logging.DEBUG}"]
