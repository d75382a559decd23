"""Errors in OpenAI's shape, with the statuses that its SDKs know."""

from __future__ import annotations

import json

import pytest

from sdbento.doors.error_shape import error_response
from sdbento.doors.openai.failures import ERRORS
from sdbento.errors import (
    DeadlineExceeded,
    GenerationFailed,
    InvalidParameter,
    MalformedRequest,
    NotFound,
    OutOfMemory,
    Overloaded,
    SDBentoError,
    TooLarge,
    UnknownModel,
    UnknownSampler,
)


@pytest.mark.parametrize(
    ("kind", "status", "error_type", "code"),
    [
        (MalformedRequest, 400, "invalid_request_error", "malformed_request"),
        (InvalidParameter, 400, "invalid_request_error", "invalid_parameter"),
        (UnknownSampler, 400, "invalid_request_error", "unknown_sampler"),
        (NotFound, 404, "invalid_request_error", "not_found"),
        (UnknownModel, 404, "invalid_request_error", "model_not_found"),
        (TooLarge, 413, "invalid_request_error", "too_large"),
        (Overloaded, 429, "rate_limit_error", "queue_full"),
        (GenerationFailed, 500, "server_error", "generation_failed"),
        (SDBentoError, 500, "server_error", "internal_error"),
        (OutOfMemory, 503, "server_error", "out_of_memory"),
        (DeadlineExceeded, 504, "server_error", "deadline_exceeded"),
    ],
)
def test_every_error_has_its_status_and_all_four_fields(
    kind: type[SDBentoError], status: int, error_type: str, code: str
) -> None:
    answer = error_response(kind("why", param="size", retry_after=1.2), ERRORS)
    assert answer.status_code == status
    assert answer.headers["retry-after"] == "2"
    error = {"message": "why", "type": error_type, "param": "size", "code": code}
    assert json.loads(bytes(answer.body)) == {"error": error}


@pytest.mark.parametrize(
    ("status", "error_type"), [(401, "authentication_error"), (403, "permission_error")]
)
def test_keys_that_are_wrong_or_not_allowed_have_types_of_their_own(
    status: int, error_type: str
) -> None:
    error = SDBentoError("no")
    error.status = status
    assert ERRORS.body(error)["error"]["type"] == error_type
    assert ERRORS.status(error) == status
