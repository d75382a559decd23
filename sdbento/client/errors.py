"""What can go wrong for a client: the server's own errors, and those of the way to it.

    SDBentoError            what the server answered, as in sdbento/errors.py
      NoAnswer              the connection broke, or the answer was not complete in time
        NotConnected        the server was not reached: it has done nothing
      NotUnderstood         an answer that this client cannot read: is it sdbento that answers?
      JobFailed             a job ended without images
      JobUnfinished         a job has not ended within the time that was given

`status` is that of the answer, 0 where there was none.
"""

from __future__ import annotations

import email.utils
import time
from contextlib import suppress
from typing import Any

import httpx

from sdbento import errors
from sdbento.client.answers import Job
from sdbento.errors import SDBentoError

# The errors of a server, each after those that it is a kind of.
TREE = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SDBentoError)
]
NOT_CONNECTED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)


class NoAnswer(SDBentoError):
    status, type = 0, "no_answer"


class NotConnected(NoAnswer):
    type = "not_connected"


class NotUnderstood(SDBentoError):
    type = "not_understood"


class JobFailed(SDBentoError):
    """`job` has its status: FAILED, CANCELLED or TIMED_OUT."""

    status, type = 0, "job_failed"

    def __init__(self, job: Job) -> None:
        super().__init__(f"job {job.id} is {job.status}" + (f": {job.error}" if job.error else ""))
        self.job = job


class JobUnfinished(SDBentoError):
    status, type = 0, "job_unfinished"


def no_answer(error: Exception) -> NoAnswer:
    """The error for one of httpx's that came in place of an answer."""
    kind = NotConnected if isinstance(error, NOT_CONNECTED) else NoAnswer
    return kind(f"{type(error).__name__}: {error}".removesuffix(": "))


def error_of(response: httpx.Response) -> SDBentoError:
    """The error that an answer tells of. Its body must have been read.

    It is of the class that the server raised, or else, as from a proxy, one with that status.
    """
    told = _told(response)
    message = told.get("message") or f"HTTP {response.status_code}: {response.text[:500]}"
    error = error_told({**told, "message": message}, response.status_code)
    error.retry_after = _retry_after(response)
    error.request_id = response.headers.get("X-Request-ID")
    return error


def error_told(told: dict[str, Any], status: int | None = None) -> SDBentoError:
    """The error in a body or event of ours; `status` None: what errors of its type have."""
    named = (kind for kind in TREE if kind.type == told.get("type"))
    alike = (kind for kind in TREE if kind.status == status)
    kind = next(named, next(alike, SDBentoError))
    error = kind(str(told.get("message")), param=told.get("param"))
    error.type = str(told.get("type") or kind.type)
    error.status = status or kind.status
    return error


def _told(response: httpx.Response) -> dict[str, Any]:
    with suppress(ValueError):
        body = response.json()
        if isinstance(body, dict) and isinstance(body.get("error"), dict):
            return dict(body["error"])
    return {}


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds to wait, which the header has as a number or as a date (RFC 9110, 10.2.3)."""
    given = response.headers.get("retry-after", "")
    if given.isdecimal():
        return float(given)
    with suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    return None
