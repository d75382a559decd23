"""What `App` asks of whatever makes the images. Knows nothing of how they are made."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from sdbento.catalog.specs import ModelSpec, Spec
from sdbento.engine.forecast import Ending
from sdbento.live.batch import Device
from sdbento.live.watchers import Source
from sdbento.request.resolved import ResolvedRequest
from sdbento.request.result import Begun


@dataclass(frozen=True)
class ResidentSpec:
    """A model or ControlNet in memory, with its bytes and what computes its attention. `device`:
    the number of the one that has it, None where there is only one."""

    spec: Spec
    nbytes: int
    attention: str
    device: int | None = None


class Backend(Source, Protocol):
    """Makes images of resolved requests. Thread-safe where nothing else is said.

    `alive`: it can make images, or will once it has started. `ready`: the default model is loaded.
    `endings`: when the requests under way will be done, the first one first.
    """

    @property
    def alive(self) -> bool: ...

    @property
    def ready(self) -> bool: ...

    @property
    def endings(self) -> Sequence[Ending]: ...

    def start(self) -> None:
        """Begin to take requests, and to load the default model in the background."""

    async def begin(self, request: ResolvedRequest) -> Begun:
        """Get the models of a request into memory, and begin to make its images.

        On behalf of the present caller. Raises errors of the `errors` tree.
        """

    def preload(self, spec: ModelSpec) -> Future[Any]:
        """Load a model before a request needs it; never blocks. Cancel the future to give up."""

    def residents(self) -> list[ResidentSpec]:
        """All that is in memory."""

    def devices(self) -> list[Device]:
        """All that compute, by their numbers."""

    def notice(self, error: Exception) -> None:
        """A request has failed with `error`, which may tell that the device has."""

    def give_up(self) -> None:
        """Refuse new requests, and fail those under way: the server has to stop now."""

    def close(self, grace: float) -> None:
        """Finish what is under way for up to `grace` seconds, and free everything. Blocking."""
