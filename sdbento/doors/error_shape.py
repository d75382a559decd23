"""How an error becomes an answer: in our own shape, or in that of the API which a door speaks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from starlette.responses import JSONResponse

from sdbento.errors import SDBentoError, Unauthorized


@dataclass(frozen=True)
class ErrorShape:
    """How a door tells its clients of an error: ours, where it imitates nobody's API."""

    body: Callable[[SDBentoError], dict[str, Any]] = SDBentoError.to_body
    status: Callable[[SDBentoError], int] = attrgetter("status")


OURS = ErrorShape()

# How a key can be sent. Browsers know only Basic, and ask their user for it.
CHALLENGES = ('Bearer realm="sdbento"', 'Basic realm="sdbento", charset="UTF-8"')


def error_response(error: SDBentoError, shape: ErrorShape = OURS) -> JSONResponse:
    """The error as an answer, with Retry-After where it says when to try again."""
    response = JSONResponse(shape.body(error), status_code=shape.status(error))
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        for challenge in CHALLENGES:
            response.headers.append("WWW-Authenticate", challenge)
    return response
