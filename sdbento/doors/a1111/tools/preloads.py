"""Models that are loaded before a request needs them."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from sdbento.access.caller import Caller
from sdbento.catalog.specs import ModelSpec

if TYPE_CHECKING:
    from sdbento.models.cache import PipelineCache
    from sdbento.models.leases import Lease


class Preloads:
    """At most one a caller, who could else make all others wait for a long row of loads."""

    def __init__(self) -> None:
        self._by_caller: dict[str | None, Future[Lease]] = {}

    def begin(self, caller: Caller, spec: ModelSpec, pipelines: PipelineCache) -> None:
        """Load a model in place of the one that `caller` may still be waiting for. Never blocks."""
        if (earlier := self._by_caller.get(caller.owner)) is not None:
            earlier.cancel()
        self._by_caller[caller.owner] = loading = pipelines.acquire(spec)
        loading.add_done_callback(_release)
        self._by_caller = {owner: one for owner, one in self._by_caller.items() if not one.done()}


def _release(loading: Future[Lease]) -> None:
    """The model stays until others need the room. Why a load failed is in the log."""
    if not loading.cancelled() and loading.exception() is None:
        loading.result().release()
