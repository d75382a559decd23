"""Errors in the shape of AUTOMATIC1111's API."""

from __future__ import annotations

import pytest

from sdbento.doors.a1111.failures import ERRORS
from sdbento.errors import InvalidParameter, OutOfMemory, SDBentoError, UnknownModel, UnknownSampler


@pytest.mark.parametrize(
    ("error", "status", "name"),
    [
        (InvalidParameter("steps is too large", param="steps"), 422, "HTTPException"),
        (UnknownModel("no model is called x"), 404, "HTTPException"),
        (UnknownSampler("Sampler not found"), 400, "HTTPException"),
        (OutOfMemory("the device ran out of memory"), 503, "OutOfMemoryError"),
    ],
)
def test_an_error_has_the_keys_of_the_web_ui(error: SDBentoError, status: int, name: str) -> None:
    assert ERRORS.status(error) == status
    assert ERRORS.body(error) == {
        "error": name,
        "detail": error.message,
        "body": "",
        "errors": f"{status}: {error.message}",
    }
