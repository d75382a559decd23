"""Models that are loaded before a request needs them."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from sdbento.access.caller import Caller
from sdbento.catalog.specs import ModelSpec

if TYPE_CHECKING:
    from sdbento.backend.protocol import Backend


class Preloads:
    """At most one a caller, who could else make all others wait for a long row of loads."""

    def __init__(self) -> None:
        self._by_caller: dict[str | None, Future[Any]] = {}

    def begin(self, caller: Caller, spec: ModelSpec, backend: Backend) -> None:
        """Load a model in place of the one that `caller` may still be waiting for. Never blocks."""
        if (earlier := self._by_caller.get(caller.owner)) is not None:
            earlier.cancel()
        self._by_caller[caller.owner] = backend.preload(spec)
        self._by_caller = {owner: one for owner, one in self._by_caller.items() if not one.done()}
