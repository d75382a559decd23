"""Errors as AUTOMATIC1111's API tells them: {"error", "detail", "body", "errors"}.

Source: `api_middleware` in the web UI's modules/api/api.py.
"""

from __future__ import annotations

from typing import Any

from sdbento.doors.error_shape import ErrorShape
from sdbento.errors import OutOfMemory, SDBentoError, UnknownSampler


def _body(error: SDBentoError) -> dict[str, Any]:
    """`error` is the name of an exception's class there; clients look for that of a lack of memory,
    and show `detail`."""
    return {
        "error": "OutOfMemoryError" if isinstance(error, OutOfMemory) else "HTTPException",
        "detail": error.message,
        "body": "",
        "errors": f"{_status(error)}: {error.message}",
    }


def _status(error: SDBentoError) -> int:
    return 400 if isinstance(error, UnknownSampler) else error.status


ERRORS = ErrorShape(body=_body, status=_status)
