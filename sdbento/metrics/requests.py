"""Counts requests for images, each once, at its end.

    a door begins it -> its model is noted, once there is one -> the door, or its job, ends it

The present request is a context variable, so that whoever knows something of it need not be handed
it. Knows nothing of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from sdbento.errors import Cancelled
from sdbento.metrics.definitions import (
    NONE,
    cancelled_total,
    expect_model,
    request_seconds,
    requests_total,
)


class CountedRequest:
    """A request that came by `route`, from its arrival to its end."""

    def __init__(self, route: str | None) -> None:
        """None: for one that is not counted."""
        self._route = route or NONE
        self._model = NONE
        self._arrived = time.monotonic()
        self._ended = route is None
        self._reason = "disconnect"  # why it was cancelled, should it end so

    def note_model(self, name: str) -> None:
        """Its images are made by this model."""
        expect_model(name)
        self._model = name

    def hand_over(self) -> None:
        """Its job will be counted in its place."""
        self._ended = True

    def cancel(self, reason: str) -> None:
        """It ends early because somebody wanted it to."""
        if not self._ended:
            self._reason = reason
            self.end(Cancelled.outcome)

    def end(self, outcome: str) -> None:
        """Count it, unless it has been counted. `outcome`: one of OUTCOMES."""
        if self._ended:
            return
        self._ended = True
        requests_total.add(self._route, self._model, outcome)
        request_seconds.observe(time.monotonic() - self._arrived)
        if outcome == Cancelled.outcome:
            cancelled_total.add(self._reason)


_current: ContextVar[CountedRequest | None] = ContextVar("counted request", default=None)


def current_request() -> CountedRequest:
    """The one on which the present task works; one that nobody counts where there is none."""
    return _current.get() or CountedRequest(None)


@contextmanager
def counting(route: str | None) -> Iterator[CountedRequest]:
    """Work on a request, which has to be ended by whoever knows its outcome. `route`: as
    CountedRequest's."""
    request = CountedRequest(route)
    token = _current.set(request)
    try:
        yield request
    finally:
        _current.reset(token)


def count_without_run(route: str, outcome: str, reason: str = "") -> None:
    """Count a job that has ended in the queue."""
    requests_total.add(route, NONE, outcome)
    if reason:
        cancelled_total.add(reason)
