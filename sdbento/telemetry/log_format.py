"""Lines of the log, as text or as JSON, each with the id of the request that it is about.

Whoever logs a line can add `fields` to it: `extra={"fields": {...}}`. A trace is named where it is
sampled, so that somebody can look at it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from opentelemetry import trace

from sdbento.settings import LogFormat
from sdbento.telemetry.request import present_request

log = logging.getLogger(__name__)

_BARE = re.compile(r"[A-Za-z0-9_./:@{}-]+")  # texts that need no quotes


class TextFormatter(logging.Formatter):
    """`time [level] message name=value ... (request=id, trace=id)`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s [%(levelname)s] %(message)s", "%Y-%m-%dT%H:%M:%S%z")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # its name in logging
        parts = [super().formatMessage(record)]
        parts += (f"{name}={_as_text(value)}" for name, value in _fields_of(record).items())
        if ids := _ids():
            names = (f"{name.removesuffix('_id')}={text}" for name, text in ids.items())
            parts.append(f"({', '.join(names)})")
        return " ".join(parts)


class JSONFormatter(logging.Formatter):
    """One object a line. ASCII only: nothing in it can end the line for any reader."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_ids(),
            **_fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line, default=str)


def formatter(log_format: LogFormat) -> logging.Formatter:
    return JSONFormatter() if log_format == "json" else TextFormatter()


def use_everywhere(chosen: logging.Formatter) -> None:
    """Let all loggers that there are write by `chosen`, those of libraries as well."""
    named = (one for one in logging.root.manager.loggerDict.values())
    loggers = [logging.root, *(one for one in named if isinstance(one, logging.Logger))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        handler.setFormatter(chosen)


def log_what_python_prints() -> None:
    """Warnings, and errors that nobody has caught, become lines of the log as well."""
    logging.captureWarnings(True)
    sys.excepthook = lambda *error: log.critical("not caught", exc_info=error)

    def log_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            log.error("a thread died", exc_info=args.exc_value)

    def log_unraisable(args: Any) -> None:
        log.error("%s: %r", args.err_msg or "ignored", args.object, exc_info=args.exc_value)

    threading.excepthook = log_thread
    sys.unraisablehook = log_unraisable


def _fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _ids() -> dict[str, str]:
    """Those of the present request, as far as there is one."""
    ids = {}
    if (request := present_request()) is not None:
        ids["request_id"] = request.id
    if (span := trace.get_current_span().get_span_context()).trace_flags.sampled:
        ids["trace_id"] = trace.format_trace_id(span.trace_id)
    return ids


def _as_text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if _BARE.fullmatch(text) else json.dumps(value, default=str)
