"""The models and ControlNets in memory: leased to requests, loaded in the background, evicted.

Files that are missing are downloaded first (`catalog/downloads`), several at once and without
memory, so that what lies on the disk never waits for a download.

A *lease* locks models onto the device until it is released. A request asks for everything that it
needs at once, and gets it at once: it never holds one model while it waits for another, so that no
two requests can deadlock. If something is not resident, the request joins the *pending sets*, and
one loader thread serves these. The owners of requests take turns, and the sets of each are served
in the order of their first request:

    next pending set -> room? -> evict the least recently used -> load what is missing -> grant
                          └ no, too much is locked: wait until a lease is released

Room is made for the whole set before any of it is loaded, and no member of the set makes room for
another. Each load also grants leases to the other pending sets that it completes.

New leases of resident models are granted at once, past the pending sets. But once the next of
these has been waiting for room longer than QUEUE_AFTER, everybody queues behind it; otherwise a
model in constant use would be leased without a gap, and never make room for another.

State: `_residency` (what is on the device), `_pending` (by their sets of keys, oldest first),
`_turns` (of the owners of requests), `_loading` (the set that is being loaded), `_leases` (not yet
released), `_weights` (bytes, of what was fetched), `_closed`, `_why_closed`; all guarded by
`_lock`, the lock of the condition `_changed`. A key names a model or ControlNet uniquely. Lock
order: a future's own lock may be taken under `_lock`, never `_lock` under a future's; callbacks of
futures run with neither. Loading and offloading hold no lock. `_offloaded` is changed by the loader
thread only.

Knows nothing of requests, nor of how something is loaded.
"""

from __future__ import annotations

import gc
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch

from sdbento.catalog.downloads.queue import Downloads
from sdbento.catalog.specs import ModelSpec, Spec
from sdbento.errors import OutOfMemory, Unavailable, classify, stopping, unexplained
from sdbento.metrics.definitions import (
    evictions_total,
    expect_model,
    memory_bytes,
    model_load_seconds,
    model_loads_total,
    out_of_memory_total,
    resident_models,
)
from sdbento.models.device import (
    GB,
    choose_device,
    choose_dtype,
    free_unused,
    memory_budget_gb,
    memory_need,
)
from sdbento.models.fetching import Fetching, Sizes
from sdbento.models.leases import (
    Grant,
    Lease,
    PendingSet,
    Waiter,
    explain,
    fail,
    hand_out,
)
from sdbento.models.memory.offload import Offloaded
from sdbento.models.memory.residency import Residency
from sdbento.models.pipeline import Resident
from sdbento.models.weights import load, needs_hub
from sdbento.settings import Settings

log = logging.getLogger(__name__)

QUEUE_AFTER = 3.0  # seconds that a pending set waits for room before new leases queue behind it
MAX_TURNS = 1024  # owners whose last turn is remembered; the others are served first
CLOSE_TIMEOUT = 5.0  # seconds that `close` waits for a load under way


@dataclass
class _Plan:
    """What the loader thread is to do for one pending set."""

    pending: PendingSet
    missing: list[Spec]
    evicted: list[Resident]  # to be moved off the device first
    grants: list[Grant]  # leases that need no load


class PipelineCache:
    """The models and ControlNets in memory. All methods are thread-safe."""

    def __init__(
        self,
        settings: Settings,
        load_resident: Callable[[Spec], Resident] | None = None,
        downloads: Downloads | None = None,
    ) -> None:
        # Makes others give up memory that they can do without, when a load finds too little.
        self.relieve: Callable[[], None] | None = None
        self._device = choose_device(settings)
        self._dtype = choose_dtype(settings, self._device)
        self._load = load_resident or partial(load, settings=settings)
        self._residency: Residency[Resident] = Residency(int(memory_budget_gb(settings) * GB))
        self._fetching: Fetching | None = None  # where a test loads something else
        if load_resident is None:
            capacity = self._residency.capacity
            self._fetching = Fetching(settings, downloads or Downloads(), capacity)
        self._weights: Sizes = {}
        self._offloaded = Offloaded(self._device)
        self._pending: OrderedDict[frozenset[str], PendingSet] = OrderedDict()
        self._turns: dict[str | None, int] = {}  # the number of each owner's last one
        self._loading: frozenset[str] = frozenset()
        self._leases: set[Lease] = set()
        self._why_closed: Callable[[], Unavailable] = stopping
        self._closed = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._loader: threading.Thread | None = None
        memory_bytes.set(self._residency.capacity, "budget")
        if self._device.type == "cuda":
            memory_bytes.follow(torch.cuda.memory_reserved, "device")

    def acquire(self, *specs: Spec) -> Future[Lease]:
        """A lease of all of `specs`, the model first, now or when all are resident; never blocks.

        Cancel the future to give up waiting. It fails with errors of the `errors` tree that name
        what could not be had; a failed load may be tried again.
        """
        waiter = Waiter(Future(), specs)
        with self._lock:
            absent = [] if self._closed else self._absent(specs)
        if absent and self._fetching is not None:
            self._fetch(waiter, absent, self._fetching)
        else:
            self._serve(waiter)
        return waiter.future

    def _fetch(self, waiter: Waiter, absent: list[Spec], fetching: Fetching) -> None:
        """Download what is absent; then serve `waiter`. It may give up meanwhile."""
        fetched = fetching.begin(absent)

        def go_on(done: Future[Sizes]) -> None:
            if done.cancelled():
                return
            error = done.exception()
            with self._lock:
                is_closed = self._closed
                if error is None:
                    self._weights |= done.result()
            if error is None or is_closed:
                self._serve(waiter)  # which says why it is closed
            else:
                model_loads_total.add("failed")
                fail([waiter], classify(error))

        waiter.future.add_done_callback(lambda _: fetched.cancel())
        fetched.add_done_callback(go_on)

    def _serve(self, waiter: Waiter) -> None:
        """Grant a lease, or let `waiter` wait for a load."""
        with self._lock:
            is_closed = self._closed
            lease = None if is_closed else self._try_lease(waiter.specs)
            if lease is None and not is_closed:
                self._enqueue(waiter)
        if is_closed:
            fail([waiter], self._why_closed())
        elif lease is None:
            # When a waiter gives up, others may no longer have to queue behind it.
            waiter.future.add_done_callback(self._wake)
        elif waiter.future.set_running_or_notify_cancel():
            waiter.future.set_result(lease)
        else:
            lease.release()

    def lease(self, *specs: Spec) -> Lease:
        """As `acquire`, but waits: `with cache.lease(spec) as pipeline:`."""
        return self.acquire(*specs).result()

    def lease_if_resident(self, spec: Spec) -> Lease | None:
        """A lease if that takes neither loading nor waiting."""
        with self._lock:
            return self._try_lease((spec,))

    def loaded(self) -> list[tuple[str, int, bool]]:
        """(key, bytes, leased) of all that is resident, the least recently used first.

        A model's key is its name; a ControlNet's is its name after `controlnet:`.
        """
        with self._lock:
            return self._residency.entries()

    def room(self) -> int:
        """Bytes of the budget that are free; negative where models turned out too large."""
        with self._lock:
            return self._residency.available

    def grow(self, resident: Resident, nbytes: int) -> None:
        """Count so many bytes more, or less, for what is resident, until it is evicted."""
        with self._lock:
            if self._residency.items().get(resident.spec.key) is resident:
                self._residency.grow(resident.spec.key, nbytes)
                self._measure()

    def residents(self) -> dict[str, Resident]:
        """All that is resident, by key."""
        with self._lock:
            return self._residency.items()

    def close(self) -> None:
        """As `abandon`; a load under way may end first."""
        self.abandon()
        if self._loader is not None and self._loader is not threading.current_thread():
            self._loader.join(CLOSE_TIMEOUT)

    def abandon(self, why: Callable[[], Unavailable] = stopping) -> None:
        """Fail all who wait and who come later, with the error that the first call's `why` makes,
        and forget all models; leases not yet released stay usable."""
        with self._changed:
            if not self._closed:
                self._closed, self._why_closed = True, why
            waiters = [waiter for pending in self._pending.values() for waiter in pending.waiters]
            self._pending.clear()
            self._residency.clear()
            self._measure()
            self._changed.notify_all()
        fail(waiters, self._why_closed())
        if self._fetching is not None:
            self._fetching.close()

    # Under the lock

    def _try_lease(self, specs: tuple[Spec, ...]) -> Lease | None:
        """A lease, if all is resident and nobody must be let through first."""
        first = self._first()
        since = None if first is None else first.blocked_since
        must_queue = since is not None and time.monotonic() - since > QUEUE_AFTER
        if must_queue or not self._residency.has_all(spec.key for spec in specs):
            return None
        return self._make_lease(specs)

    def _absent(self, specs: tuple[Spec, ...]) -> list[Spec]:
        """Those whose files may have to be downloaded: neither in memory nor about to be."""
        if self._fetching is None:
            return []
        awaited = {*self._loading, *(key for keys in self._pending for key in keys)}
        return [
            spec
            for spec in specs
            if not self._residency.has_all([spec.key])
            and spec.key not in awaited
            and spec.key not in self._offloaded
            and needs_hub(spec)
        ]

    def _make_lease(self, specs: tuple[Spec, ...]) -> Lease:
        lease = Lease(self._residency.lock([spec.key for spec in specs]), self._release)
        self._leases.add(lease)
        return lease

    def _enqueue(self, waiter: Waiter) -> None:
        pending = PendingSet({spec.key: spec for spec in waiter.specs})
        self._pending.setdefault(pending.keys, pending).waiters.append(waiter)
        if self._loader is None or not self._loader.is_alive():
            self._loader = threading.Thread(target=self._run, name="sdbento-loader", daemon=True)
            self._loader.start()
        self._changed.notify_all()

    def _first(self) -> PendingSet | None:
        """The set to serve next: the oldest of the owner whose last turn is the longest ago."""
        return min(self._pending.values(), key=self._last_turn, default=None)

    def _last_turn(self, pending: PendingSet) -> float:
        """0 where one of those who wait had none yet, infinite where nobody waits any more."""
        return min((self._turns.get(owner, 0) for owner in pending.owners), default=math.inf)

    def _take_turn(self, pending: PendingSet) -> None:
        turn = max(self._turns.values(), default=0) + 1
        self._turns |= dict.fromkeys(pending.owners, turn)
        latest = sorted(self._turns, key=self._turns.__getitem__)[-MAX_TURNS:]
        self._turns = {owner: self._turns[owner] for owner in latest}

    def _grant_leases(self) -> list[Grant]:
        """Leases for all pending sets that are resident by now, to be handed out unlocked."""
        complete = [keys for keys in self._pending if self._residency.has_all(keys)]
        return [
            (waiter.future, self._make_lease(waiter.specs))
            for keys in complete
            for waiter in self._pending.pop(keys).waiters
            if waiter.future.set_running_or_notify_cancel()
        ]

    def _evict(self, keys: list[str]) -> list[Resident]:
        evicted = self._residency.evict(keys)
        for resident in evicted:
            log.info("%s is evicted", resident.spec)
        evictions_total.add(amount=len(evicted))
        self._measure()
        return evicted

    def _measure(self) -> None:
        """Tell what is in memory now."""
        entries = self._residency.entries()
        resident_models.set(len(entries))
        memory_bytes.set(sum(nbytes for _, nbytes, _ in entries), "models")

    def _missing(self, pending: PendingSet) -> list[Spec]:
        return [spec for key, spec in pending.specs.items() if not self._residency.has_all([key])]

    def _need(self, spec: Spec) -> int:
        return max(memory_need(spec, self._dtype), self._weights.get(spec.key, 0))

    def _too_large(self, pending: PendingSet) -> OutOfMemory | None:
        """The error for a set that does not fit even where nothing else is resident."""
        sizes = {
            spec: self._residency.nbytes(key)
            if self._residency.has_all([key])
            else self._need(spec)
            for key, spec in pending.specs.items()
        }
        total, capacity = sum(sizes.values()), self._residency.capacity
        if total <= capacity:
            return None
        dtype = str(self._dtype).removeprefix("torch.")
        needs = " and ".join(f"{spec} needs {size / GB:.1f} GB" for spec, size in sizes.items())
        together = f", {total / GB:.1f} GB together" if len(sizes) > 1 else ""
        return OutOfMemory(
            f"{needs} in {dtype}{together}, but models may take {capacity / GB:.1f} GB together "
            "(SDBENTO_MEMORY_GB)",
            param="model",
        )

    def _make_room(self, pending: PendingSet) -> _Plan | None:
        """Evict and reserve for all that `pending` lacks; None where too much is locked."""
        missing = self._missing(pending)
        needs = {spec.key: self._need(spec) for spec in missing}
        total = sum(needs.values())
        victims = self._residency.victims(total, spare=pending.keys) if total else []
        if victims is None:
            pending.blocked_since = pending.blocked_since or time.monotonic()
            return None
        evicted = self._evict(victims)
        for key, nbytes in needs.items():
            self._residency.reserve(key, nbytes)
        pending.blocked_since = None
        self._take_turn(pending)
        self._loading = pending.keys
        # Who queued behind this set for models that are resident need not wait for its loads.
        return _Plan(pending, missing, evicted, self._grant_leases())

    # From any thread

    def _release(self, lease: Lease) -> None:
        with self._changed:
            if lease in self._leases:
                self._leases.remove(lease)
                if not self._closed:
                    self._residency.unlock(lease.keys)
                self._changed.notify_all()

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()

    # The loader thread

    def _run(self) -> None:
        """Serve pending sets until closed. Whatever goes wrong, those who wait are told.

        Should the thread die all the same, the next request to wait starts another.
        """
        while not self._closed:
            try:
                self._serve_first()
            except BaseException as exc:  # nobody else would tell those who wait
                self._fail_waiters(None, exc)
        self._offloaded.clear()

    def _serve_first(self) -> None:
        match self._next():
            case _Plan() as plan:
                self._execute(plan)
            case (pending, error):
                model_loads_total.add("failed")
                log.error("%s", error.message)
                fail(pending.waiters, error)

    def _next(self) -> _Plan | tuple[PendingSet, OutOfMemory] | None:
        """Wait until the next pending set can be served; make room for it, or refuse it.

        None once the cache is closed.
        """
        with self._changed:
            while not self._closed:
                pending = self._first()
                if pending is None:
                    self._changed.wait()
                elif pending.cancelled:
                    del self._pending[pending.keys]
                elif self._missing(pending) and (error := self._too_large(pending)) is not None:
                    del self._pending[pending.keys]
                    return pending, error
                elif (plan := self._make_room(pending)) is not None:
                    return plan
                else:
                    self._changed.wait()
        return None

    def _execute(self, plan: _Plan) -> None:
        """Load what is missing, and grant leases to all who waited for it."""
        hand_out(plan.grants)
        try:
            for spec in plan.missing:
                try:
                    self._offload(plan.evicted)
                    if not plan.pending.cancelled:
                        self._add(self._restore_or_load(spec))
                except BaseException as exc:
                    model_loads_total.add("failed")
                    self._fail_waiters(spec, exc)
                    return
        finally:
            self._cancel_reservations(plan.missing)

    def _cancel_reservations(self, specs: list[Spec]) -> None:
        with self._lock:
            self._loading = frozenset()
            for spec in specs:
                self._residency.cancel(spec.key)

    def _add(self, resident: Resident) -> None:
        """Make what was loaded resident. If it is larger than announced, others are evicted."""
        with self._lock:
            if self._closed:
                return
            self._residency.add(resident.spec.key, resident, resident.nbytes)
            if isinstance(resident.spec, ModelSpec):
                expect_model(resident.spec.name)
            grants = self._grant_leases()
            excess = self._evict(self._residency.victims(0, spare=self._loading) or [])
        hand_out(grants)
        self._offload(excess)

    def _restore_or_load(self, spec: Spec) -> Resident:
        began = time.monotonic()
        restored = self._offloaded.take(spec.key)
        resident = restored or self._load_with_retry(spec)
        model_loads_total.add("ok" if restored is None else "restored")
        model_load_seconds.observe(time.monotonic() - began)
        return resident

    def _load_with_retry(self, spec: Spec) -> Resident:
        """Load; if the device is fuller than was counted, evict all that can go and try again."""
        log.info("%s is being loaded", spec)
        try:
            return self._load(spec)
        except torch.OutOfMemoryError:
            out_of_memory_total.add()
            with self._lock:
                evicted = self._evict(self._residency.evictable(spare=self._loading))
            if self.relieve is not None:
                self.relieve()
            elif not evicted:
                raise
        self._offload(evicted)
        return self._load(spec)

    def _offload(self, evicted: list[Resident]) -> None:
        """Move what was evicted off the device; empties the list, which would keep it alive."""
        if not evicted:
            return
        while evicted:
            self._offloaded.put(evicted.pop(0))
        gc.collect()  # pipelines and their modules refer to each other
        free_unused(self._device)

    def _fail_waiters(self, failed: Spec | None, exc: BaseException) -> None:
        """Fail all who wait for `failed`; None: the loader itself went wrong, fail everybody."""
        with self._lock:
            hit = [keys for keys in self._pending if failed is None or failed.key in keys]
            pending_sets = [self._pending.pop(keys) for keys in hit]
        known = classify(exc)
        for pending in pending_sets:
            error = explain(failed or next(iter(pending.specs.values())), known)
            log.error("%s", error.message, exc_info=unexplained(exc))
            fail(pending.waiters, error)
