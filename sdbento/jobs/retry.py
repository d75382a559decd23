"""Patience with a database that is away and a disk that is full. Knows nothing of what is kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from sdbento.errors import classify, unexplained

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE, LAST_PAUSE = 0.1, 10.0  # seconds before it is tried again


async def insist(keep: Callable[[], Awaitable[T]], what: str) -> T:
    """Do `keep` until the database and the disk let it; `what` names in the log what it keeps."""
    pause = FIRST_PAUSE
    while True:
        try:
            return await keep()
        except (DBAPIError, OSError) as exc:
            log.error("%s cannot be kept yet: %s", what, _reason(exc))
        await asyncio.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE)


def _reason(exc: Exception) -> str:
    """For the log, which may name files: what clients are told, or else the system's own words."""
    return classify(exc).message if unexplained(exc) is None else str(exc)
