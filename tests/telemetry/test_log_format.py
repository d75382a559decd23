"""Lines of the log, whoever writes them."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest

from sdbento.telemetry.log_format import (
    JSONFormatter,
    TextFormatter,
    log_what_python_prints,
    use_everywhere,
)
from sdbento.telemetry.request import RequestFacts, handling

FORGED = 'GET /a\n{"level": "INFO"}\r\u2028\u0085ä'


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What a logger that writes JSON has written."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    factory = logging.getLogRecordFactory()
    logging.setLogRecordFactory(logging.LogRecord)  # the service's makes one line of each message
    logging.getLogger("somebody.else").addHandler(handler)
    use_everywhere(JSONFormatter())
    yield written
    logging.getLogger("somebody.else").removeHandler(handler)
    use_everywhere(logging.Formatter())
    logging.setLogRecordFactory(factory)


def test_a_line_of_json_is_one_object_whatever_is_in_it(written: io.StringIO) -> None:
    logging.getLogger("somebody.else").warning("%s", FORGED, extra={"fields": {"path": FORGED}})
    (line,) = written.getvalue().splitlines()
    told = json.loads(line)
    assert (told["message"], told["path"], told["level"]) == (FORGED, FORGED, "WARNING")
    assert told["logger"] == "somebody.else" and told["time"].endswith("+00:00")
    assert line.isascii()


def test_a_traceback_is_part_of_the_object(written: io.StringIO) -> None:
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("somebody.else").exception("failed")
    (line,) = written.getvalue().splitlines()
    assert json.loads(line)["exception"].endswith("ValueError: no")


def test_a_line_names_the_request_that_it_is_about(written: io.StringIO) -> None:
    with handling(RequestFacts("id-1")):
        logging.getLogger("somebody.else").warning("within")
    logging.getLogger("somebody.else").warning("after")
    within, after = map(json.loads, written.getvalue().splitlines())
    assert within["request_id"] == "id-1" and "request_id" not in after


def test_text_has_fields_and_ids_on_the_line_of_the_message() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "request", (), None)
    record.fields = {"route": "/status/{id}", "status": 200, "path": 'a b"\n', "seconds": 0.5}
    with handling(RequestFacts("id-1")):
        line = TextFormatter().format(record)
    _, _, told = line.partition(" [INFO] ")
    fields = r'route=/status/{id} status=200 path="a b\"\n" seconds=0.5'
    assert told == f"request {fields} (request=id-1)"


def test_what_python_would_print_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "excepthook", None)
    monkeypatch.setattr(sys, "unraisablehook", None)
    monkeypatch.setattr(threading, "excepthook", None)
    log_what_python_prints()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("an old way", stacklevel=1)
        error = ValueError("nobody catches it")
        sys.excepthook(ValueError, error, None)
        threading.excepthook(threading.ExceptHookArgs((ValueError, error, None, None)))
    finally:
        logging.captureWarnings(False)
    assert "an old way" in caplog.text
    assert caplog.text.count("ValueError: nobody catches it") == 2
