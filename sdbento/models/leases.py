"""Leases of resident models, the requests that wait for one, and why one cannot be had.

Knows nothing of memory or of loading. The cache grants leases, and its lock guards what waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from sdbento.access.caller import current_caller
from sdbento.catalog.specs import Spec
from sdbento.errors import (
    InvalidParameter,
    ModelLoadFailed,
    NotFound,
    OutOfMemory,
    SDBentoError,
)
from sdbento.models.pipeline import Pipeline, Resident


class Lease:
    """The right to use `resources`, a model first, which stay on the device until `release`.

    As a context manager it gives the model's Pipeline, and releases at the end.
    """

    def __init__(self, resources: tuple[Resident, ...], release: Callable[[Lease], None]) -> None:
        self.resources = resources
        self._release = release

    @property
    def pipeline(self) -> Pipeline:
        model = self.resources[0]
        if not isinstance(model, Pipeline):
            raise TypeError(f"the lease's first is {model.spec}, not a model")
        return model

    @property
    def keys(self) -> list[str]:
        return [resource.spec.key for resource in self.resources]

    def release(self) -> None:
        """Allow all to be evicted, as far as this lease is concerned. Idempotent, thread-safe."""
        self._release(self)

    def __enter__(self) -> Pipeline:
        return self.pipeline

    def __exit__(self, *_: object) -> None:
        self.release()


Grant = tuple[Future[Lease], Lease]


@dataclass(eq=False)
class Waiter:
    """A request that waits for a lease of `specs`, in the order in which it named them."""

    future: Future[Lease]
    specs: tuple[Spec, ...]
    owner: str | None = field(default_factory=lambda: current_caller().owner)


@dataclass(eq=False)
class PendingSet:
    """Models and ControlNets that must be resident together, and the requests that wait for that.

    Requests for the same set, whatever its order, wait together.
    """

    specs: dict[str, Spec]  # by key
    waiters: list[Waiter] = field(default_factory=list)
    blocked_since: float | None = None  # since when it waits for room, by time.monotonic()

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self.specs)

    @property
    def owners(self) -> set[str | None]:
        """Those whose requests wait for it."""
        return {waiter.owner for waiter in self.waiters if not waiter.future.cancelled()}

    @property
    def cancelled(self) -> bool:
        return all(waiter.future.cancelled() for waiter in self.waiters)


def hand_out(grants: Iterable[Grant]) -> None:
    """Complete futures with their leases. Callbacks run here: hold no lock."""
    for future, lease in grants:
        future.set_result(lease)


def fail(waiters: Iterable[Waiter], error: SDBentoError) -> None:
    """Fail the futures of all who have not given up. Callbacks run here: hold no lock."""
    for waiter in waiters:
        if waiter.future.set_running_or_notify_cancel():
            waiter.future.set_exception(error)


def give_up(future: Future[Lease]) -> None:
    """Stop waiting for a lease; if it has been granted, or is just being granted, release it."""

    def release(done: Future[Lease]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().release()

    if not future.cancel():
        future.add_done_callback(release)


def explain(spec: Spec, error: SDBentoError) -> SDBentoError:
    """`error` as the reason why `spec` could not be loaded, with its name in the message."""
    reason = error.message
    if isinstance(error, OutOfMemory) and error.__cause__ is not None:  # the device's, not ours
        reason = "the device ran out of memory"
    if str(spec) not in reason:
        reason = f"{spec} cannot be loaded: {reason}"
    about_models = isinstance(error, NotFound | InvalidParameter | ModelLoadFailed | OutOfMemory)
    explained = (type(error) if about_models else ModelLoadFailed)(reason, param=spec.param)
    explained.__cause__ = error.__cause__ or error
    return explained
