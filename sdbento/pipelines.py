"""Resident models: leased, loaded in the background, evicted when memory is short.

A *lease* pins a model: it stays on the device until the lease is released. A model that is not
resident becomes a *wish*; one loader thread fulfils wishes in the order of their first request:

    wish at the head -> room? -> evict the least recently used -> load -> lease to all its waiters
                          └ all pinned: wait for a release

A wish that has waited for room longer than PATIENCE holds up the new leases of every other model:
they queue behind it, so that a model in constant use cannot starve another.

State: `_resident` (models by name), `_budget` (their bytes, pins and order of use), `_wishes` (by
name, oldest first), `_leases` (those that are out), `_closed`; all guarded by `_lock`, the lock of
the condition `_changed`. Lock order: a future's own lock may be taken under `_lock`, never `_lock`
under a future's; callbacks of futures run with neither. Loading and parking hold no lock.
`_parking` belongs to the loader thread.

Knows nothing of requests; how a model is loaded is `weights`' business.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch

from sdbento.budget import Budget
from sdbento.catalog import ModelSpec
from sdbento.errors import (
    InvalidParameter,
    ModelLoadFailed,
    NotFound,
    OutOfMemory,
    SDBentoError,
    Unavailable,
    classify,
)
from sdbento.parking import Parking
from sdbento.settings import Settings
from sdbento.weights import (
    GB,
    Pipeline,
    choose_device,
    choose_dtype,
    free_unused,
    load,
    memory_budget_gb,
    memory_need,
    pull,
)

__all__ = ["Lease", "Pipeline", "PipelineCache", "memory_budget_gb", "pull"]

log = logging.getLogger(__name__)

PATIENCE = 3.0  # seconds that a wish waits for room before others must queue behind it
CLOSE_PATIENCE = 5.0  # seconds that `close` waits for a load under way


class Lease:
    """The right to use a model; as a context manager it gives the Pipeline, and releases."""

    def __init__(self, pipeline: Pipeline, give_back: Callable[[Lease], None]) -> None:
        self.pipeline = pipeline
        self._give_back = give_back

    def release(self) -> None:
        """Let the model be evicted, as far as this lease is concerned. Idempotent, thread-safe."""
        self._give_back(self)

    def __enter__(self) -> Pipeline:
        return self.pipeline

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(eq=False)
class _Wish:
    """A model that somebody waits for."""

    spec: ModelSpec
    waiters: list[Future[Lease]] = field(default_factory=list)
    blocked_since: float | None = None  # when it first found no room; set by the loader

    @property
    def abandoned(self) -> bool:
        return all(waiter.cancelled() for waiter in self.waiters)


class PipelineCache:
    """The models in memory. All methods are thread-safe."""

    def __init__(
        self, settings: Settings, load_pipeline: Callable[[ModelSpec], Pipeline] | None = None
    ) -> None:
        device = choose_device(settings)
        self._device = device
        self._dtype = choose_dtype(settings, device)
        self._load = load_pipeline or partial(load, settings=settings)
        self._budget = Budget(int(memory_budget_gb(settings) * GB))
        self._parking = Parking(device)
        self._resident: dict[str, Pipeline] = {}
        self._wishes: OrderedDict[str, _Wish] = OrderedDict()
        self._leases: set[Lease] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._loader: threading.Thread | None = None

    def acquire(self, spec: ModelSpec) -> Future[Lease]:
        """A lease, now or when the model has been loaded; never blocks.

        Cancel the future to give up waiting. It fails with errors of the `errors` tree that name
        the model; a failed load may be tried again.
        """
        future: Future[Lease] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(Unavailable("the server is stopping"))
            elif spec.name in self._resident and not self._held_up():
                future.set_result(self._pin(spec.name))
            else:
                self._wish(spec, future)
        if not future.done():
            future.add_done_callback(self._wake)  # a cancelled wish may free the way for others
        return future

    def lease(self, spec: ModelSpec) -> Lease:
        """As `acquire`, but waits: `with cache.lease(spec) as pipeline:`."""
        return self.acquire(spec).result()

    def loaded(self) -> list[tuple[str, int, bool]]:
        """(name, bytes, leased) of every resident model, the least recently used first."""
        with self._lock:
            return [
                (name, self._budget.nbytes(name), self._budget.pinned(name))
                for name in self._budget.names()
                if name in self._resident
            ]

    def is_loading(self, name: str) -> bool:
        """Whether somebody waits for that model to become resident."""
        with self._lock:
            return name in self._wishes and name not in self._resident

    def close(self) -> None:
        """Fail whoever waits, and forget all models; leases that are out stay usable."""
        with self._changed:
            self._closed = True
            waiters = [waiter for wish in self._wishes.values() for waiter in wish.waiters]
            self._wishes.clear()
            self._resident.clear()
            self._changed.notify_all()
        _fail(waiters, Unavailable("the server is stopping"))
        if self._loader is not None and self._loader is not threading.current_thread():
            self._loader.join(CLOSE_PATIENCE)

    # Under the lock

    def _held_up(self) -> bool:
        """Whether the oldest wish has run out of patience with the leases of others."""
        since = next(iter(self._wishes.values())).blocked_since if self._wishes else None
        return since is not None and time.monotonic() - since > PATIENCE

    def _pin(self, name: str) -> Lease:
        self._budget.pin(name)
        lease = Lease(self._resident[name], self._release)
        self._leases.add(lease)
        return lease

    def _wish(self, spec: ModelSpec, future: Future[Lease]) -> None:
        self._wishes.setdefault(spec.name, _Wish(spec)).waiters.append(future)
        if self._loader is None:
            self._loader = threading.Thread(target=self._run, name="sdbento-loader", daemon=True)
            self._loader.start()
        self._changed.notify_all()

    def _grant(self) -> list[tuple[Future[Lease], Lease]]:
        """Leases of all resident models for all who wait for one, to be handed out unlocked."""
        wishes = [self._wishes.pop(name) for name in list(self._wishes) if name in self._resident]
        return [
            (waiter, self._pin(wish.spec.name))
            for wish in wishes
            for waiter in wish.waiters
            if waiter.set_running_or_notify_cancel()
        ]

    def _evict(self, names: list[str]) -> list[Pipeline]:
        for name in names:
            log.info("model %s makes room", name)
            self._budget.release(name)
        return [self._resident.pop(name) for name in names if name in self._resident]

    # From any thread

    def _release(self, lease: Lease) -> None:
        with self._changed:
            if lease in self._leases:
                self._leases.remove(lease)
                self._budget.unpin(lease.pipeline.spec.name)
                self._changed.notify_all()

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()

    # The loader thread

    def _run(self) -> None:
        """Fulfil wishes until closed. Whatever happens to one, its waiters hear of it."""
        while not self._closed:
            name = None
            try:
                name = self._next()
                if name is not None:
                    self._fulfil(name)
            except BaseException as exc:  # anything: nobody else would tell those who wait
                self._disappoint(name, exc)
        self._parking.clear()

    def _next(self) -> str | None:
        """Wait for a wish at the head of the queue that can be fulfilled, or for `close`."""
        with self._changed:
            while not self._closed:
                name = next(iter(self._wishes), None)
                if name is not None and self._wishes[name].abandoned:
                    del self._wishes[name]
                    continue
                if name is not None and self._can_have_room(self._wishes[name]):
                    return name
                self._changed.wait()
        return None

    def _can_have_room(self, wish: _Wish) -> bool:
        need = self._need(wish.spec)
        if wish.spec.name in self._resident or need > self._budget.capacity:
            return True  # needs no room, or will be told that it never gets it
        if self._budget.victims(need) is not None:
            return True
        wish.blocked_since = wish.blocked_since or time.monotonic()
        return False

    def _need(self, spec: ModelSpec) -> int:
        return memory_need(spec, self._dtype)

    def _fulfil(self, name: str) -> None:
        """Make `name` resident if it is not, and lease it to all who wait for it."""
        with self._lock:
            wish = self._wishes.get(name)
            if wish is None or not self._can_have_room(wish):  # any more
                return
            resident = name in self._resident
            evicted = [] if resident else self._make_room(wish.spec)
            wish.blocked_since = None
            grants = self._grant()  # who queued behind this wish need not wait while it loads
        _hand_out(grants)
        if not resident:
            self._park(evicted)
            self._admit(self._parking.take(name) or self._load_at_once(wish.spec))

    def _admit(self, pipeline: Pipeline) -> None:
        """Make a loaded model resident, at its true size."""
        name = pipeline.spec.name
        with self._lock:
            if self._closed:
                return
            self._resident[name] = pipeline
            self._budget.reserve(name, pipeline.nbytes)
            grants = self._grant()
            excess = self._evict(self._budget.victims(0) or [])
        _hand_out(grants)
        self._park(excess)

    def _make_room(self, spec: ModelSpec) -> list[Pipeline]:
        need, capacity = self._need(spec), self._budget.capacity
        dtype = str(self._dtype).removeprefix("torch.")
        if need > capacity:
            raise OutOfMemory(
                f"model {spec.name} needs {need / GB:.1f} GB in {dtype}, but models "
                f"may take {capacity / GB:.1f} GB together (SDBENTO_MEMORY_GB)",
                param="model",
            )
        evicted = self._evict(self._budget.victims(need) or [])
        self._budget.reserve(spec.name, need)
        return evicted

    def _load_at_once(self, spec: ModelSpec) -> Pipeline:
        """Load; where the device is fuller than was counted, again without all that can go."""
        log.info("model %s is being loaded", spec.name)
        try:
            return self._load(spec)
        except torch.OutOfMemoryError:
            with self._lock:
                unused = [name for name in self._resident if not self._budget.pinned(name)]
                evicted = self._evict(unused)
            if not evicted:
                raise
        self._park(evicted)
        return self._load(spec)

    def _park(self, evicted: list[Pipeline]) -> None:
        """Take evicted models off the device; `evicted` is empty afterwards, lest it keep them."""
        if not evicted:
            return
        while evicted:
            self._parking.put(evicted.pop(0))
        gc.collect()  # pipelines and their modules refer to each other
        free_unused(self._device)

    def _disappoint(self, name: str | None, exc: BaseException) -> None:
        """Fail those who wait for `name`; all who wait, where the loader itself went wrong."""
        with self._lock:
            names = [name] if name is not None else list(self._wishes)
            wishes = [self._wishes.pop(n) for n in names if n in self._wishes]
            for unfulfilled in names:
                if unfulfilled in self._budget and unfulfilled not in self._resident:
                    self._budget.release(unfulfilled)
        for wish in wishes:
            known = classify(exc)
            error = _explain(wish.spec, known)
            log.error("%s", error.message, exc_info=exc if type(known) is SDBentoError else None)
            _fail(wish.waiters, error)


def _hand_out(grants: list[tuple[Future[Lease], Lease]]) -> None:
    for waiter, lease in grants:
        waiter.set_result(lease)


def _fail(waiters: list[Future[Lease]], error: SDBentoError) -> None:
    for waiter in waiters:
        if waiter.set_running_or_notify_cancel():
            waiter.set_exception(error)


def _explain(spec: ModelSpec, error: SDBentoError) -> SDBentoError:
    """Why a model is not there, with its name."""
    reason = error.message
    if isinstance(error, OutOfMemory) and error.__cause__ is not None:  # the device's, not ours
        reason = "the device ran out of memory"
    if f"model {spec.name}" not in reason:
        reason = f"model {spec.name} cannot be loaded: {reason}"
    about_models = isinstance(error, NotFound | InvalidParameter | ModelLoadFailed | OutOfMemory)
    explained = (type(error) if about_models else ModelLoadFailed)(reason, param="model")
    explained.__cause__ = error.__cause__ or error
    return explained
