"""Whether a call that failed is tried again, and when. Knows nothing of how calls are made."""

from __future__ import annotations

import random

from sdbento.backoff import Backoff
from sdbento.client.errors import NoAnswer, NotConnected
from sdbento.errors import OutOfMemory, SDBentoError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds, where the server does not say how long
LONGEST_WAIT = 120.0  # seconds; who is told to wait longer is told so, not kept waiting
REFUSED = (429, 503)
JITTER = 0.25  # a pause is longer by up to this share, lest all clients come back at once


class Retries:
    """The attempts of one call.

    A call is repeated where the server has refused it (429, 503) or was not reached. Any other may
    have been run, and images cost time of a GPU: it is repeated only if it is `harmless`, as one
    that only asks. A lack of memory is not repeated: the same request would meet it again.
    """

    def __init__(self, max_retries: int, *, harmless: bool) -> None:
        self._left = max_retries
        self._unheard = NoAnswer if harmless else NotConnected
        self._backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE)

    def pause_after(self, error: SDBentoError) -> float | None:
        """Seconds to wait before the next attempt; None: there is none, `error` stands."""
        if self._left == 0 or not self._is_repeated(error):
            return None
        pause = max(self._backoff.next_pause(), error.retry_after or 0.0)
        if pause > LONGEST_WAIT:
            return None
        self._left -= 1
        return pause * random.uniform(1.0, 1.0 + JITTER)

    def _is_repeated(self, error: SDBentoError) -> bool:
        if isinstance(error, OutOfMemory):
            return False
        return error.status in REFUSED or isinstance(error, self._unheard)
