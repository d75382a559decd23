"""Resident models and ControlNets: leased, loaded in the background, evicted when memory is short.

A *lease* pins what it holds: it stays on the device until the lease is released. A request asks for
all that it needs at once, and gets it at once: it never holds one thing while it waits for another,
so that no two requests can wait for each other. What is not all resident becomes a *wish*, a set;
one loader thread fulfils wishes in the order of their first request:

    wish at the head -> room? -> evict the least recently used -> load what is missing -> lease all
                          └ all pinned: wait for a release

Room is made for all that is missing before the first of it is loaded, and nothing of the set makes
room. Each load also serves the other wishes that it completes.

A wish that has waited for room longer than PATIENCE holds up the new leases of all others: they
queue behind it, so that a model in constant use cannot starve another.

State: `_resident` (by key), `_budget` (bytes, pins and order of use, by key; what is being loaded
has its estimate reserved), `_wishes` (by their set of keys, oldest first), `_kept` (the set that is
being loaded), `_leases` (those that are out), `_closed`; all guarded by `_lock`, the lock of the
condition `_changed`. A key is what no other model and no ControlNet goes by. Lock order: a future's
own lock may be taken under `_lock`, never `_lock` under a future's; callbacks of futures run with
neither. Loading and parking hold no lock. `_parking` belongs to the loader thread.

Knows nothing of requests; how something is loaded is `weights`' business.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial

import torch

from sdbento.catalog.specs import Spec
from sdbento.errors import OutOfMemory, classify, unexplained
from sdbento.models.budget import Budget
from sdbento.models.device import (
    GB,
    choose_device,
    choose_dtype,
    free_unused,
    memory_budget_gb,
    memory_need,
)
from sdbento.models.leases import Lease, Waiter, Wish, explain, fail, hand_out, stopping
from sdbento.models.offload import Parking
from sdbento.models.pipeline import Resident
from sdbento.models.weights import load
from sdbento.settings import Settings

log = logging.getLogger(__name__)

PATIENCE = 3.0  # seconds that a wish waits for room before others must queue behind it
CLOSE_PATIENCE = 5.0  # seconds that `close` waits for a load under way


class PipelineCache:
    """The models and ControlNets in memory. All methods are thread-safe."""

    def __init__(
        self, settings: Settings, load_resident: Callable[[Spec], Resident] | None = None
    ) -> None:
        device = choose_device(settings)
        self._device = device
        self._dtype = choose_dtype(settings, device)
        self._load = load_resident or partial(load, settings=settings)
        self._budget = Budget(int(memory_budget_gb(settings) * GB))
        self._parking = Parking(device)
        self._resident: dict[str, Resident] = {}
        self._wishes: OrderedDict[frozenset[str], Wish] = OrderedDict()
        self._kept: frozenset[str] = frozenset()
        self._leases: set[Lease] = set()
        self._closed = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._loader: threading.Thread | None = None

    def acquire(self, *specs: Spec) -> Future[Lease]:
        """A lease of all of `specs`, the model first, now or when all are resident; never blocks.

        Cancel the future to give up waiting. It fails with errors of the `errors` tree that name
        what could not be had; a failed load may be tried again.
        """
        waiter = Waiter(Future(), specs)
        with self._lock:
            if self._closed:
                waiter.future.set_exception(stopping())
            elif self._has_all(spec.key for spec in specs) and not self._held_up():
                waiter.future.set_result(self._pin(specs))
            else:
                self._wish(waiter)
        if not waiter.future.done():
            # A cancelled wish may free the way for others.
            waiter.future.add_done_callback(self._wake)
        return waiter.future

    def lease(self, *specs: Spec) -> Lease:
        """As `acquire`, but waits: `with cache.lease(spec) as pipeline:`."""
        return self.acquire(*specs).result()

    def lease_if_resident(self, spec: Spec) -> Lease | None:
        """A lease where that takes neither loading nor waiting."""
        with self._lock:
            free = self._has_all([spec.key]) and not self._held_up()
            return self._pin((spec,)) if free else None

    def loaded(self) -> list[tuple[str, int, bool]]:
        """(key, bytes, leased) of all that is resident, the least recently used first.

        A model's key is its name; a ControlNet's is its name after `controlnet:`.
        """
        with self._lock:
            return [
                (key, self._budget.nbytes(key), self._budget.pinned(key))
                for key in self._budget.names()
                if key in self._resident
            ]

    def is_loading(self, key: str) -> bool:
        """Whether somebody waits for that to become resident."""
        with self._lock:
            wanted = any(key in wish.specs for wish in self._wishes.values())
            return wanted and key not in self._resident

    def close(self) -> None:
        """Fail whoever waits, and forget all models; leases that are out stay usable."""
        with self._changed:
            self._closed = True
            waiters = [waiter for wish in self._wishes.values() for waiter in wish.waiters]
            self._wishes.clear()
            self._resident.clear()
            self._changed.notify_all()
        fail(waiters, stopping())
        if self._loader is not None and self._loader is not threading.current_thread():
            self._loader.join(CLOSE_PATIENCE)

    # Under the lock

    def _has_all(self, keys: Iterable[str]) -> bool:
        return all(key in self._resident for key in keys)

    def _held_up(self) -> bool:
        """Whether the oldest wish has run out of patience with the leases of others."""
        since = next(iter(self._wishes.values())).blocked_since if self._wishes else None
        return since is not None and time.monotonic() - since > PATIENCE

    def _pin(self, specs: tuple[Spec, ...]) -> Lease:
        lease = Lease(tuple(self._resident[spec.key] for spec in specs), self._release)
        for key in lease.keys:
            self._budget.pin(key)
        self._leases.add(lease)
        return lease

    def _wish(self, waiter: Waiter) -> None:
        specs = {spec.key: spec for spec in waiter.specs}
        self._wishes.setdefault(frozenset(specs), Wish(specs)).waiters.append(waiter)
        if self._loader is None:
            self._loader = threading.Thread(target=self._run, name="sdbento-loader", daemon=True)
            self._loader.start()
        self._changed.notify_all()

    def _grant(self) -> list[tuple[Future[Lease], Lease]]:
        """Leases for all whose wishes have come true, to be handed out unlocked."""
        wishes = [self._wishes.pop(keys) for keys in list(self._wishes) if self._has_all(keys)]
        return [
            (waiter.future, self._pin(waiter.specs))
            for wish in wishes
            for waiter in wish.waiters
            if waiter.future.set_running_or_notify_cancel()
        ]

    def _evict(self, keys: list[str]) -> list[Resident]:
        evicted = [self._resident.pop(key) for key in keys]
        for resident in evicted:
            log.info("%s makes room", resident.spec)
            self._budget.release(resident.spec.key)
        return evicted

    def _missing(self, wish: Wish) -> list[Spec]:
        return [spec for key, spec in wish.specs.items() if key not in self._resident]

    def _victims(self, wish: Wish, nbytes: int) -> list[str] | None:
        return self._budget.victims(nbytes, spare=wish.specs)

    # From any thread

    def _release(self, lease: Lease) -> None:
        with self._changed:
            if lease in self._leases:
                self._leases.remove(lease)
                for key in lease.keys:
                    self._budget.unpin(key)
                self._changed.notify_all()

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()

    # The loader thread

    def _run(self) -> None:
        """Fulfil wishes until closed. Whatever happens to one, its waiters hear of it."""
        while not self._closed:
            try:
                wish = self._next()
                if wish is not None:
                    self._fulfil(wish)
            except BaseException as exc:  # anything: nobody else would tell those who wait
                self._disappoint(None, exc)
        self._parking.clear()

    def _next(self) -> Wish | None:
        """Wait for a wish at the head of the queue that can be fulfilled, or for `close`."""
        with self._changed:
            while not self._closed:
                keys, wish = next(iter(self._wishes.items()), (None, None))
                if keys is not None and wish is not None:
                    if wish.abandoned:
                        del self._wishes[keys]
                        continue
                    if self._can_have_room(wish):
                        return wish
                self._changed.wait()
        return None

    def _can_have_room(self, wish: Wish) -> bool:
        need = sum(map(self._need, self._missing(wish)))
        if need == 0 or self._oversize(wish) is not None:
            return True  # needs no room, or will be told that it never gets it
        if self._victims(wish, need) is not None:
            return True
        wish.blocked_since = wish.blocked_since or time.monotonic()
        return False

    def _need(self, spec: Spec) -> int:
        return memory_need(spec, self._dtype)

    def _oversize(self, wish: Wish) -> OutOfMemory | None:
        """What to tell who wants more than fits at once even where nothing else is resident."""
        sizes = {
            spec: self._budget.nbytes(key) if key in self._resident else self._need(spec)
            for key, spec in wish.specs.items()
        }
        total, capacity = sum(sizes.values()), self._budget.capacity
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

    def _fulfil(self, wish: Wish) -> None:
        """Make resident what is missing, and lease all to all who wait for it."""
        keys = frozenset(wish.specs)
        with self._lock:
            if self._wishes.get(keys) is not wish or not self._can_have_room(wish):  # any more
                return
            missing = self._missing(wish)
            refused = self._oversize(wish) if missing else None
            if refused is not None:
                del self._wishes[keys]
            else:
                evicted = self._make_room(wish, missing)
                grants = self._grant()  # who queued behind this wish need not wait for its loads
        if refused is not None:
            log.error("%s", refused.message)
            fail(wish.waiters, refused)
            return
        hand_out(grants)
        try:
            self._load_missing(wish, missing, evicted)
        finally:
            self._forget(missing)

    def _make_room(self, wish: Wish, missing: list[Spec]) -> list[Resident]:
        """Reserve for all that is missing; returns what has to leave for it."""
        needs = {spec.key: self._need(spec) for spec in missing}
        evicted = self._evict(self._victims(wish, sum(needs.values())) or []) if needs else []
        for key, nbytes in needs.items():
            self._budget.reserve(key, nbytes)
        wish.blocked_since = None
        self._kept = frozenset(wish.specs)
        return evicted

    def _load_missing(self, wish: Wish, missing: list[Spec], evicted: list[Resident]) -> None:
        for spec in missing:
            try:
                self._park(evicted)
                if not wish.abandoned:
                    self._admit(self._parking.take(spec.key) or self._load_at_once(spec))
            except BaseException as exc:
                self._disappoint(spec, exc)
                return

    def _forget(self, missing: list[Spec]) -> None:
        """What was reserved for what did not become resident."""
        with self._lock:
            self._kept = frozenset()
            for spec in missing:
                if spec.key not in self._resident and not self._closed:
                    self._budget.release(spec.key)

    def _admit(self, resident: Resident) -> None:
        """Make what was loaded resident, at its true size."""
        key = resident.spec.key
        with self._lock:
            if self._closed:
                return
            self._resident[key] = resident
            self._budget.reserve(key, resident.nbytes)
            grants = self._grant()
            excess = self._evict(self._budget.victims(0, spare=self._kept) or [])
        hand_out(grants)
        self._park(excess)

    def _load_at_once(self, spec: Spec) -> Resident:
        """Load; where the device is fuller than was counted, again without all that can go."""
        log.info("%s is being loaded", spec)
        try:
            return self._load(spec)
        except torch.OutOfMemoryError:
            with self._lock:
                unused = [
                    key
                    for key in self._resident
                    if key not in self._kept and not self._budget.pinned(key)
                ]
                evicted = self._evict(unused)
            if not evicted:
                raise
        self._park(evicted)
        return self._load(spec)

    def _park(self, evicted: list[Resident]) -> None:
        """Take off the device what was evicted; the list is empty afterwards, lest it keep it."""
        if not evicted:
            return
        while evicted:
            self._parking.put(evicted.pop(0))
        gc.collect()  # pipelines and their modules refer to each other
        free_unused(self._device)

    def _disappoint(self, failed: Spec | None, exc: BaseException) -> None:
        """Fail those who wait for `failed`; all who wait, where the loader itself went wrong."""
        with self._lock:
            hit = [k for k in self._wishes if failed is None or failed.key in k]
            wishes = [self._wishes.pop(keys) for keys in hit]
        known = classify(exc)
        for wish in wishes:
            error = explain(failed or next(iter(wish.specs.values())), known)
            log.error("%s", error.message, exc_info=unexplained(exc))
            fail(wish.waiters, error)
