"""What somebody waits for and what they get: wishes, leases, and why there is none.

Knows nothing of memory or of loading; `pipelines` grants the wishes, and its lock guards them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from sdbento.catalog.specs import Spec
from sdbento.errors import (
    InvalidParameter,
    ModelLoadFailed,
    NotFound,
    OutOfMemory,
    SDBentoError,
    Unavailable,
)
from sdbento.models.pipeline import Pipeline, Resident


class Lease:
    """The right to use what it holds, the model first; as a context manager it gives the Pipeline,
    and releases."""

    def __init__(self, resources: tuple[Resident, ...], give_back: Callable[[Lease], None]) -> None:
        self.resources = resources
        self._give_back = give_back

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
        """Let all be evicted, as far as this lease is concerned. Idempotent, thread-safe."""
        self._give_back(self)

    def __enter__(self) -> Pipeline:
        return self.pipeline

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(eq=False)
class Waiter:
    """One request's future; it gets its resources in the order in which it named them."""

    future: Future[Lease]
    specs: tuple[Spec, ...]


@dataclass(eq=False)
class Wish:
    """What must be resident at the same time, and all who wait for just that."""

    specs: dict[str, Spec]  # by key
    waiters: list[Waiter] = field(default_factory=list)
    blocked_since: float | None = None  # when it first found no room; set by the loader

    @property
    def abandoned(self) -> bool:
        return all(waiter.future.cancelled() for waiter in self.waiters)


def hand_out(grants: Iterable[tuple[Future[Lease], Lease]]) -> None:
    for future, lease in grants:
        future.set_result(lease)


def give_up(future: Future[Lease]) -> None:
    """A lease is no longer wanted, whether or not it has come yet."""

    def release(done: Future[Lease]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().release()

    if not future.cancel():
        future.add_done_callback(release)


def fail(waiters: Iterable[Waiter], error: SDBentoError) -> None:
    for waiter in waiters:
        if waiter.future.set_running_or_notify_cancel():
            waiter.future.set_exception(error)


def explain(spec: Spec, error: SDBentoError) -> SDBentoError:
    """Why something is not there, with its name."""
    reason = error.message
    if isinstance(error, OutOfMemory) and error.__cause__ is not None:  # the device's, not ours
        reason = "the device ran out of memory"
    if str(spec) not in reason:
        reason = f"{spec} cannot be loaded: {reason}"
    about_models = isinstance(error, NotFound | InvalidParameter | ModelLoadFailed | OutOfMemory)
    explained = (type(error) if about_models else ModelLoadFailed)(reason, param=spec.param)
    explained.__cause__ = error.__cause__ or error
    return explained


def stopping() -> Unavailable:
    return Unavailable("the server is stopping")
