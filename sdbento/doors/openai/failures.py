"""Errors as OpenAI's API tells them: {"error": {"message", "type", "param", "code"}}.

Source: "Error codes" in OpenAI's reference. Its SDKs raise one class of exception for each status,
and try 408, 409, 429 and those from 500 on again.
"""

from __future__ import annotations

from typing import Any

from sdbento.doors.error_shape import ErrorShape
from sdbento.errors import InvalidParameter, SDBentoError, UnknownModel

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key"}


def to_body(error: SDBentoError) -> dict[str, Any]:
    """`code` is OpenAI's where it has one for such errors, else the type that we give them."""
    code = "model_not_found" if isinstance(error, UnknownModel) else error.type
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(error.status, _type(error.status)),
            "param": error.param,
            "code": _CODES.get(error.status, code),
        }
    }


def _type(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


def _status(error: SDBentoError) -> int:
    return 400 if isinstance(error, InvalidParameter) else error.status


ERRORS = ErrorShape(body=to_body, status=_status)
