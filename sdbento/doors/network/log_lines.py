"""Keeps what clients send from forging lines of the log: a path may have a line break (`%0a`).

All loggers of the process are covered, ours as well as uvicorn's and BentoML's, whose access log
has the path as it was meant, not as it was written.
"""

from __future__ import annotations

import logging
import re

# What moves a terminal's cursor or begins a line for some reader of the log. A tab does no harm.
_CONTROLS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


class OneLineRecord(logging.LogRecord):
    """Its message is one line. A traceback, which comes after it, is as many as it needs."""

    def getMessage(self) -> str:  # noqa: N802  # its name in logging
        message = super().getMessage().rstrip("\n")
        return _CONTROLS.sub(lambda found: repr(found.group())[1:-1], message)


def write_one_line_each() -> None:
    """From here on, whichever logger is used."""
    logging.setLogRecordFactory(OneLineRecord)
