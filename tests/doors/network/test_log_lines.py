"""What clients send cannot look like a line of the log."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from sdbento.doors.network.log_lines import write_one_line_each


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    before = logging.getLogRecordFactory()
    written = io.StringIO()
    logger = logging.Logger("of somebody else")
    logger.addHandler(logging.StreamHandler(written))
    write_one_line_each()
    yield logger, written
    logging.setLogRecordFactory(before)


def test_control_characters_are_written_as_escapes(
    log: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, written = log
    logger.warning("GET %s", "/a\r\n2026-01-01 [INFO] forged \x1b[2J \x85\u2028\tä")
    assert written.getvalue() == ("GET /a\\r\\n2026-01-01 [INFO] forged \\x1b[2J \\x85\\u2028\tä\n")


def test_tracebacks_keep_their_lines(log: tuple[logging.Logger, io.StringIO]) -> None:
    logger, written = log
    try:
        raise ValueError("no")
    except ValueError:
        logger.exception("failed\n")
    lines = written.getvalue().splitlines()
    assert lines[0] == "failed" and lines[-1] == "ValueError: no" and len(lines) > 3
