"""Repeats what must not be given up, however long the database is away or the disk full.

Knows nothing of what is read and stored.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from sdbento.backoff import Backoff
from sdbento.errors import classify, unexplained

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds between two attempts


async def retry_while_refused(call: Callable[[], Awaitable[T]], problem: str) -> T:
    """Await `call()`, again and again while the database or the file system refuses it.

    problem: what cannot be done yet, as the log says it: "a job's end cannot be kept".
    Any error that is neither the database's nor the file system's is raised.
    """
    backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)
    while True:
        try:
            return await call()
        except (DBAPIError, OSError) as exc:
            log.error("%s yet: %s", problem, _reason(exc))
        await asyncio.sleep(backoff.next_pause())


def _reason(exc: Exception) -> str:
    """What clients are told, or the system's own words: the log may name files."""
    return classify(exc).message if unexplained(exc) is None else str(exc)
