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
BEARER, BASIC = 'Bearer realm="sdbento"', 'Basic realm="sdbento", charset="UTF-8"'


def error_response(
    error: SDBentoError, shape: ErrorShape = OURS, *, to_script: bool = False
) -> JSONResponse:
    """The error as an answer, with Retry-After where it says when to try again.

    `to_script`: a script of a page gets it, which asks the user for a key better than the browser.
    """
    response = JSONResponse(shape.body(error), status_code=shape.status(error))
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        for challenge in [BEARER] if to_script else [BEARER, BASIC]:
            response.headers.append("WWW-Authenticate", challenge)
    return response
