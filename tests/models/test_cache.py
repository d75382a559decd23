"""The model cache: when leases are given, what is evicted, and which leases a failure reaches."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import pytest
import torch

from sdbento.access.caller import Caller, acting_for
from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import ControlNetSpec, ModelSpec
from sdbento.environment import load_settings
from sdbento.errors import (
    ModelLoadFailed,
    OutOfMemory,
    SDBentoError,
    Unavailable,
    UnknownModel,
    UnsupportedModel,
)
from sdbento.models import cache as model_cache
from sdbento.models.cache import PipelineCache
from sdbento.models.leases import Lease
from sdbento.models.memory.offload import Offloaded
from sdbento.models.pipeline import ControlNet
from tests.support.fake_loader import GB, SOON, FakeLoader, control, spec
from tests.support.metrics import counted

MOMENT = 0.1  # seconds after which something that must not happen would have happened


@pytest.fixture
def make(loader: FakeLoader) -> Iterator[Callable[..., PipelineCache]]:
    """Makes caches of `memory_gb` on the fake loader, and closes them at the end."""
    made: list[PipelineCache] = []

    def make_cache(memory_gb: float = 2.0) -> PipelineCache:
        settings = load_settings(memory_gb=memory_gb, device="cpu")
        made.append(PipelineCache(settings, loader))
        return made[-1]

    yield make_cache
    loader.gate.set()
    for cache in made:
        cache.close()


@pytest.fixture
def cache(make: Callable[..., PipelineCache]) -> PipelineCache:
    """Room for two models of 1 GB."""
    return make()


def get(future: Future[Lease]) -> Lease:
    return future.result(SOON)


def error_of(future: Future[Lease]) -> SDBentoError:
    error = future.exception(SOON)
    assert isinstance(error, SDBentoError)
    return error


def still_waiting(future: Future[Lease]) -> bool:
    try:
        future.exception(MOMENT)
    except FutureTimeoutError:
        return True
    return False


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# Leases


def test_a_model_is_loaded_once_and_leased_to_many(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    first, second = get(cache.acquire(spec("a"))), get(cache.acquire(spec("a")))
    assert first.pipeline is second.pipeline
    assert loader.loaded == ["a"]


def test_a_resident_model_is_leased_at_once(cache: PipelineCache) -> None:
    cache.lease(spec("a")).release()
    assert cache.acquire(spec("a")).done()


def test_a_lease_of_resident_models_only_loads_nothing(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    assert cache.lease_if_resident(spec("a")) is None
    cache.lease(spec("a")).release()
    lease = cache.lease_if_resident(spec("a"))
    assert lease is not None
    assert [leased for *_, leased in cache.loaded()] == [True]
    lease.release()
    assert [leased for *_, leased in cache.loaded()] == [False]
    cache.close()
    assert cache.lease_if_resident(spec("a")) is None
    assert loader.loaded == ["a"]


def test_acquire_does_not_wait_for_the_load(cache: PipelineCache, loader: FakeLoader) -> None:
    loader.gate.clear()
    waiters = [cache.acquire(spec("a")) for _ in range(3)]
    assert not any(waiter.done() for waiter in waiters)
    until(lambda: loader.loaded == ["a"])
    assert cache.loaded() == []
    loader.gate.set()
    assert len({get(waiter).pipeline for waiter in waiters}) == 1
    assert loader.loaded == ["a"]


def test_other_models_are_leased_while_one_loads(cache: PipelineCache, loader: FakeLoader) -> None:
    cache.lease(spec("a")).release()
    loader.gate.clear()
    waiter = cache.acquire(spec("b"))
    assert cache.acquire(spec("a")).done()
    assert not waiter.done()


def test_a_lease_is_a_context_manager_and_its_release_is_idempotent(cache: PipelineCache) -> None:
    with cache.lease(spec("a")) as pipeline:
        assert pipeline.spec.name == "a"
        assert cache.loaded() == [("a", GB, True)]
    assert cache.loaded() == [("a", GB, False)]
    lease, other = cache.lease(spec("a")), cache.lease(spec("a"))
    lease.release()
    lease.release()
    assert cache.loaded() == [("a", GB, True)], "the other lease still holds it"
    other.release()


def test_a_model_counts_with_its_measured_size(cache: PipelineCache, loader: FakeLoader) -> None:
    loader.sizes["a"] = 0.25
    with cache.lease(spec("a")):
        assert cache.loaded() == [("a", GB // 4, True)]


# Room


def test_the_least_recently_used_makes_room(cache: PipelineCache) -> None:
    for name in ("a", "b", "a", "c"):
        cache.lease(spec(name)).release()
    assert [name for name, *_ in cache.loaded()] == ["a", "c"]


def test_a_leased_model_is_passed_by(cache: PipelineCache) -> None:
    with cache.lease(spec("a")):
        cache.lease(spec("b")).release()
        cache.lease(spec("c")).release()
        assert [name for name, *_ in cache.loaded()] == ["a", "c"]


def test_an_evicted_model_is_freed(cache: PipelineCache) -> None:
    lease = cache.lease(spec("a", 2))
    alive = weakref.ref(lease.pipeline.pipe)
    lease.release()
    del lease
    cache.lease(spec("b", 2)).release()
    gc.collect()
    assert alive() is None


def test_a_load_waits_until_a_lease_is_released(cache: PipelineCache) -> None:
    lease = cache.lease(spec("a", 2))
    waiter = cache.acquire(spec("b", 2))
    assert still_waiting(waiter)
    lease.release()
    assert get(waiter).pipeline.spec.name == "b"


def test_loads_that_wait_are_served_in_their_order(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    lease = cache.lease(spec("a", 2))
    waiters = {name: cache.acquire(spec(name, 2)) for name in ("b", "c", "d")}
    lease.release()
    for waiter in waiters.values():
        get(waiter).release()
    assert loader.loaded == ["a", "b", "c", "d"]


def test_a_model_larger_than_the_budget_is_refused_with_both_numbers(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    cache.lease(spec("a")).release()
    error = error_of(cache.acquire(spec("big", 5)))
    assert isinstance(error, OutOfMemory)
    assert error.message == (
        "model big needs 5.0 GB in float32, but models may take 2.0 GB together (SDBENTO_MEMORY_GB)"
    )
    assert loader.loaded == ["a"]
    assert cache.loaded() == [("a", GB, False)], "nobody made room for it in vain"


def test_a_model_larger_than_announced_evicts_others(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    cache.lease(spec("a")).release()
    loader.sizes["b"] = 1.5
    with cache.lease(spec("b")):
        until(lambda: [name for name, *_ in cache.loaded()] == ["b"])


# Sets


def test_a_set_is_leased_when_all_of_it_is_resident(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    loader.gate.clear()
    waiter = cache.acquire(spec("a"), control("c"))
    assert still_waiting(waiter)
    loader.gate.set()
    lease = get(waiter)
    assert [resource.spec.name for resource in lease.resources] == ["a", "c"]
    model, network = lease.resources
    assert model is lease.pipeline
    assert isinstance(network, ControlNet)
    assert cache.loaded() == [("a", GB, True), ("controlnet:c", GB, True)]
    lease.release()
    lease.release()
    assert cache.loaded() == [("a", GB, False), ("controlnet:c", GB, False)]
    with cache.lease(spec("a"), control("c")) as pipeline:
        assert pipeline is model
    assert loader.loaded == ["a", "c"]


def test_a_lease_holds_its_models_in_the_order_asked_for(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    loader.gate.clear()
    both = [cache.acquire(spec("a"), spec("b")), cache.acquire(spec("b"), spec("a"))]
    loader.gate.set()
    assert [get(waiter).pipeline.spec.name for waiter in both] == ["a", "b"]
    assert loader.loaded == ["a", "b"], "each once"


def test_a_model_asked_for_twice_is_the_same_model(cache: PipelineCache) -> None:
    lease = cache.lease(spec("a"), control("c"), control("c"))
    assert lease.resources[1] is lease.resources[2]
    lease.release()
    assert not any(leased for *_, leased in cache.loaded())


def test_a_model_and_a_controlnet_may_have_the_same_name(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    lease = cache.lease(spec("a"), control("a"))
    assert [key for key, *_ in cache.loaded()] == ["a", "controlnet:a"]
    lease.release()
    assert loader.loaded == ["a", "a"]


def test_a_model_shared_by_two_sets_is_loaded_once(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    loader.gate.clear()
    waiters = [cache.acquire(spec("a"), control("c")), cache.acquire(spec("a"))]
    loader.gate.set()
    for waiter in waiters:
        get(waiter)
    assert sorted(loader.loaded) == ["a", "c"]


def test_a_load_serves_the_other_sets_that_it_completes(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    loader.gate.clear()
    whole, part = cache.acquire(spec("a"), control("c")), cache.acquire(spec("a"))
    until(lambda: loader.loaded == ["a"])
    real, loader.gate = loader.gate, threading.Event()  # the next load waits at another gate
    real.set()
    get(part).release()
    assert not whole.done()
    loader.gate.set()
    get(whole).release()


def test_the_members_of_a_set_never_make_room_for_each_other(
    make: Callable[..., PipelineCache], loader: FakeLoader
) -> None:
    cache = make(3.0)
    for name in ("a", "b", "c"):
        cache.lease(spec(name)).release()
    with cache.lease(spec("d"), spec("a")):  # a is the least recently used
        assert [key for key, *_ in cache.loaded()] == ["c", "d", "a"]
    assert loader.loaded == ["a", "b", "c", "d"]


def test_no_member_of_a_set_is_evicted_where_the_device_is_fuller_than_counted(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    cache.lease(spec("a")).release()
    loader.errors = [torch.OutOfMemoryError()]
    error = error_of(cache.acquire(spec("a"), control("c")))
    assert isinstance(error, OutOfMemory)
    assert error.message == "ControlNet c cannot be loaded: the device ran out of memory"
    assert cache.loaded() == [("a", GB, False)]


def test_a_member_larger_than_announced_does_not_evict_another(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    loader.sizes["a"] = 1.5
    with get(cache.acquire(spec("a"), control("c"))):
        assert [key for key, *_ in cache.loaded()] == ["a", "controlnet:c"]
    assert loader.loaded == ["a", "c"]


def test_a_set_waits_for_room_for_all_missing_members_before_any_is_loaded(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    lease = cache.lease(spec("a"))
    waiter = cache.acquire(spec("b"), control("c"))
    assert still_waiting(waiter)
    assert loader.loaded == ["a"]
    lease.release()
    get(waiter).release()
    assert loader.loaded == ["a", "b", "c"]


def test_a_set_larger_than_the_budget_is_refused_with_all_sizes(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    cache.lease(spec("a")).release()
    error = error_of(cache.acquire(spec("a"), control("c", 0.5), control("d", 0.7)))
    assert isinstance(error, OutOfMemory)
    assert error.message == (
        "model a needs 1.0 GB and ControlNet c needs 0.5 GB and ControlNet d needs 0.7 GB in "
        "float32, 2.2 GB together, but models may take 2.0 GB together (SDBENTO_MEMORY_GB)"
    )
    assert loader.loaded == ["a"]
    get(cache.acquire(spec("a"), control("c", 0.5))).release()


def test_three_overlapping_sets_in_a_tight_budget_all_get_their_turn(
    cache: PipelineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache, "QUEUE_AFTER", 0.01)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    things: list[ModelSpec | ControlNetSpec] = [spec("a"), control("b"), spec("c")]
    turns = [0, 0, 0]

    def work(i: int) -> None:
        for _ in range(20):
            lease = get(cache.acquire(things[i], things[(i + 1) % 3]))
            assert len(cache.loaded()) == 2
            turns[i] += 1
            lease.release()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert turns == [20, 20, 20]


def test_a_failed_load_fails_only_the_leases_that_wait_for_it(
    make: Callable[..., PipelineCache], loader: FakeLoader
) -> None:
    cache = make(4.0)
    loader.gate.clear()
    first = cache.acquire(spec("z"))
    until(lambda: loader.loaded == ["z"])
    failing = [cache.acquire(control("c"), spec("a")), cache.acquire(spec("b"), control("c"))]
    others = [cache.acquire(spec("a")), cache.acquire(spec("b"), control("d"))]
    loader.failing = {"c": OSError("disk on fire")}
    loader.gate.set()
    for waiter in failing:
        error = error_of(waiter)
        assert isinstance(error, ModelLoadFailed)
        assert error.message.startswith("ControlNet c cannot be loaded: unexpected error")
        assert error.param == "controlnet.type"
    for waiter in (first, *others):
        get(waiter).release()
    until(lambda: not any(leased for *_, leased in cache.loaded()))
    assert cache._residency.used == 4 * GB, "nothing is reserved for what failed"


def test_the_rest_of_an_abandoned_set_is_not_loaded(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    loader.gate.clear()
    waiter = cache.acquire(spec("a"), control("c"))
    until(lambda: loader.loaded == ["a"])
    assert waiter.cancel()
    loader.gate.set()
    until(lambda: not cache._pending)
    assert cache.loaded() == [("a", GB, False)]
    until(lambda: cache._residency.used == GB)
    assert loader.loaded == ["a"]


def test_a_lease_without_a_model_has_no_pipeline(cache: PipelineCache) -> None:
    lease = cache.lease(control("c"))
    with pytest.raises(TypeError, match="ControlNet c, not a model"):
        _ = lease.pipeline
    lease.release()


# Who queues


def test_a_model_in_constant_use_does_not_starve_another(
    cache: PipelineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache, "QUEUE_AFTER", 0.05)
    lease = cache.lease(spec("a", 2))
    waiter = cache.acquire(spec("b", 2))
    until(lambda: not still_waiting_at_once(cache, lease))
    queued = cache.acquire(spec("a", 2))
    lease.release()
    get(waiter).release()
    get(queued).release()


def still_waiting_at_once(cache: PipelineCache, lease: Lease) -> bool:
    """Whether a new lease of a leased model is still given at once; the lease is released again."""
    another = cache.acquire(lease.pipeline.spec)
    if another.done():
        another.result().release()
        return True
    assert another.cancel()
    return False


def test_leases_of_a_resident_model_are_given_while_another_model_waits_briefly(
    cache: PipelineCache,
) -> None:
    lease = cache.lease(spec("a", 2))
    waiter = cache.acquire(spec("b", 2))
    assert still_waiting(waiter)
    again = cache.acquire(spec("a", 2))
    assert again.done()
    lease.release()
    assert still_waiting(waiter)
    get(again).release()
    get(waiter).release()


def acquire_for(owner: str, cache: PipelineCache, *names: str) -> list[Future[Lease]]:
    with acting_for(Caller(owner)):
        return [cache.acquire(spec(name)) for name in names]


def test_owners_take_turns_however_many_models_each_asks_for(
    make: Callable[..., PipelineCache], loader: FakeLoader
) -> None:
    cache = make(memory_gb=8)
    loader.gate.clear()
    futures = acquire_for("alice", cache, "a1", "a2", "a3", "a4")
    until(lambda: loader.loaded == ["a1"])
    futures += acquire_for("bob", cache, "b1", "b2") + acquire_for("carol", cache, "c1")
    loader.gate.set()
    for future in futures:
        get(future)
    assert loader.loaded == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_a_set_is_served_in_the_turn_of_any_who_still_wait_for_it(
    make: Callable[..., PipelineCache], loader: FakeLoader
) -> None:
    cache = make(memory_gb=8)
    loader.gate.clear()
    futures = acquire_for("alice", cache, "a1", "a2", "a3", "a4")
    until(lambda: loader.loaded == ["a1"])
    futures += acquire_for("bob", cache, "a4")
    [given_up] = acquire_for("carol", cache, "a3")
    given_up.cancel()
    loader.gate.set()
    for future in futures:
        get(future)
    assert loader.loaded == ["a1", "a4", "a2", "a3"]


def test_leases_queued_behind_a_blocked_set_do_not_wait_for_its_load(
    make: Callable[..., PipelineCache], loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache, "QUEUE_AFTER", -1.0)
    cache = make(3.0)
    small, large = cache.lease(spec("small")), cache.lease(spec("large", 2))
    waiter = cache.acquire(spec("new", 2))
    until(lambda: not still_waiting_at_once(cache, small))
    queued = cache.acquire(spec("small"))
    assert still_waiting(queued)
    loader.gate.clear()
    large.release()
    get(queued).release()
    assert not waiter.done()
    loader.gate.set()
    get(waiter).release()


def test_a_cancelled_lease_lets_the_next_ones_pass(
    cache: PipelineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache, "QUEUE_AFTER", -1.0)
    lease = cache.lease(spec("a", 2))
    waiter = cache.acquire(spec("b", 2))
    until(lambda: not still_waiting_at_once(cache, lease))
    queued = cache.acquire(spec("a", 2))
    assert waiter.cancel()
    get(queued).release()


# Giving up


def test_a_cancelled_waiter_holds_no_lease(cache: PipelineCache, loader: FakeLoader) -> None:
    loader.gate.clear()
    cancelled, kept = cache.acquire(spec("a")), cache.acquire(spec("a"))
    assert cancelled.cancel()
    loader.gate.set()
    get(kept).release()
    assert cache.loaded() == [("a", GB, False)]


def test_an_abandoned_load_is_kept_but_not_leased(cache: PipelineCache, loader: FakeLoader) -> None:
    loader.gate.clear()
    waiter = cache.acquire(spec("a"))
    until(lambda: loader.loaded == ["a"])
    assert waiter.cancel()
    loader.gate.set()
    until(lambda: cache.loaded() == [("a", GB, False)])


def test_a_model_that_nobody_waits_for_is_not_loaded(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    lease = cache.lease(spec("a", 2))
    assert cache.acquire(spec("b", 2)).cancel()
    until(lambda: not cache._pending)
    lease.release()
    cache.lease(spec("c")).release()
    assert loader.loaded == ["a", "c"]


# Failures


def test_a_failed_load_fails_its_own_waiters_and_can_be_tried_again(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    loader.gate.clear()
    loader.errors = [OSError("disk on fire")]
    waiters = [cache.acquire(spec("a")), cache.acquire(spec("a"))]
    other = cache.acquire(spec("b"))
    loader.gate.set()
    for waiter in waiters:
        error = error_of(waiter)
        assert isinstance(error, ModelLoadFailed)
        assert error.message.startswith("model a cannot be loaded: unexpected error, id ")
        assert "fire" not in error.message
    get(other).release()
    get(cache.acquire(spec("a"))).release()
    assert cache.loaded() == [("b", GB, False), ("a", GB, False)]


def named(error: str) -> Exception:
    """An error of another library; `classify` recognises it by its class name."""
    kind: type[Exception] = type(error, (Exception,), {})
    return kind("secret")


@pytest.mark.parametrize(
    ("raised", "kind", "reason"),
    [
        (named("RepositoryNotFoundError"), UnknownModel, "no such model on the Hub"),
        (named("SafetensorError"), ModelLoadFailed, "a weights file is damaged"),
        (ConnectionError(), ModelLoadFailed, "a network connection failed"),
        (torch.OutOfMemoryError("secret"), OutOfMemory, "the device ran out of memory"),
        (MemoryError(), OutOfMemory, "the device ran out of memory"),
        (UnsupportedModel("model a is not supported: x"), UnsupportedModel, "not supported: x"),
        (SystemExit(), ModelLoadFailed, "unexpected error"),
    ],
)
def test_every_failure_names_the_model_and_the_reason(
    raised: BaseException,
    kind: type[SDBentoError],
    reason: str,
    cache: PipelineCache,
    loader: FakeLoader,
) -> None:
    loader.errors = [raised]
    error = error_of(cache.acquire(spec("a")))
    assert type(error) is kind
    assert error.message.startswith("model a ")
    assert reason in error.message
    assert "secret" not in error.message
    get(cache.acquire(spec("a"))).release()


def test_a_device_fuller_than_counted_is_emptied_and_tried_once_more(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    cache.lease(spec("a")).release()
    loader.errors = [torch.OutOfMemoryError()]
    cache.lease(spec("b")).release()
    assert cache.loaded() == [("b", GB, False)]
    assert loader.loaded == ["a", "b", "b"]


def test_a_full_device_is_relieved_even_where_nothing_can_be_evicted(
    cache: PipelineCache, loader: FakeLoader
) -> None:
    relieved = list[int]()
    cache.relieve = lambda: relieved.append(1)
    leased = cache.lease(spec("a"))
    cache.lease(spec("b")).release()
    assert relieved == []
    loader.errors = [torch.OutOfMemoryError()]
    cache.lease(spec("c")).release()
    assert (relieved, loader.loaded) == ([1], ["a", "b", "c", "c"])
    leased.release()


def test_the_loader_thread_survives_its_own_errors(
    cache: PipelineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_need", lambda _: 1 / 0)
        assert "model a cannot be loaded" in error_of(cache.acquire(spec("a"))).message
    get(cache.acquire(spec("a"))).release()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loader_that_died_is_replaced_by_the_next_request(
    cache: PipelineCache, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_fail_waiters", lambda *_: 1 / 0)
        loader.errors = [OSError("disk on fire")]
        waiter = cache.acquire(spec("a"))
        until(lambda: cache._loader is not None and not cache._loader.is_alive())
    get(cache.acquire(spec("b"))).release()
    get(waiter).release()


# Closing


def test_closing_fails_waiting_and_later_leases(cache: PipelineCache, loader: FakeLoader) -> None:
    lease = cache.lease(spec("a", 2))
    waiter = cache.acquire(spec("b", 2))
    cache.close()
    for future in (waiter, cache.acquire(spec("a", 2))):
        assert isinstance(error_of(future), Unavailable)
    lease.release()
    cache.close()
    assert cache.loaded() == []


def test_a_load_that_ends_after_closing_harms_nobody(
    cache: PipelineCache, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache, "CLOSE_TIMEOUT", 0.01)
    loader.gate.clear()
    waiter = cache.acquire(spec("a"))
    until(lambda: loader.loaded == ["a"])
    cache.close()
    assert isinstance(error_of(waiter), Unavailable)
    loader.gate.set()
    assert cache._loader is not None
    cache._loader.join(SOON)
    assert not cache._loader.is_alive()
    assert cache.loaded() == []


# Everything at once


def test_many_threads_never_exceed_the_budget_and_leak_no_lease(
    make: Callable[..., PipelineCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache, "QUEUE_AFTER", 0.01)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # it takes longer than all the rest
    cache = make(2.0)
    worst = 0.0

    def work(seed: int) -> None:
        nonlocal worst
        for i in range(25):
            model, network = spec("abcd"[(seed * 7 + i * i) % 4]), control("cd"[i % 2])
            future = cache.acquire(model, network) if seed % 2 else cache.acquire(model)
            if (seed + i) % 5 == 0 and future.cancel():
                continue
            with get(future):
                worst = max(worst, sum(nbytes for _, nbytes, _ in cache.loaded()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert worst <= 2 * GB
    until(lambda: not any(leased for *_, leased in cache.loaded()))
    until(lambda: not cache._pending)
    assert not cache._leases


# Offloading, on a GPU that is played by the CPU


def test_a_gpu_model_is_offloaded_and_comes_back_without_loading(
    cache: PipelineCache, loader: FakeLoader, moves: list[tuple[str, str]]
) -> None:
    cache._offloaded = Offloaded(torch.device("cuda"))
    for name in ("a", "b", "a"):
        cache.lease(spec(name, 2)).release()
    assert loader.loaded == ["a", "b"]
    assert moves == [("a", "host"), ("b", "host"), ("a", "device")]


def test_a_controlnet_is_offloaded_and_comes_back_without_loading(
    cache: PipelineCache, loader: FakeLoader, moves: list[tuple[str, str]]
) -> None:
    cache._offloaded = Offloaded(torch.device("cuda"))
    for specs in ([spec("a"), control("a")], [spec("b", 2)], [spec("a"), control("a")]):
        cache.lease(*specs).release()
    assert loader.loaded == ["a", "a", "b"]
    assert moves[:2] == [("a", "host")] * 2
    assert moves[-2:] == [("a", "device")] * 2


def test_loads_evictions_and_memory_are_counted(cache: PipelineCache, loader: FakeLoader) -> None:
    before = counted()
    for name in ("a", "b", "a", "c"):
        cache.lease(spec(name)).release()
    loader.errors = [ModelLoadFailed("not now")]
    error_of(cache.acquire(spec("d")))
    error_of(cache.acquire(spec("huge", 5)))
    after = counted()
    grown = after.since(before)
    assert grown["sdbento_model_loads_total{outcome=ok}"] == 3
    assert grown["sdbento_model_load_seconds_count"] == 3
    assert grown["sdbento_model_loads_total{outcome=failed}"] == 2
    assert grown["sdbento_evictions_total"] == 2  # for "c", and for "d", which did not come
    assert after.value("sdbento_resident_models") == 1
    assert after.value("sdbento_memory_bytes", kind="models") == GB
    assert after.value("sdbento_memory_bytes", kind="budget") == 2 * GB


def test_what_comes_back_from_host_memory_and_a_full_device_are_counted(
    cache: PipelineCache, loader: FakeLoader, moves: list[tuple[str, str]]
) -> None:
    before = counted()
    cache._offloaded = Offloaded(torch.device("cuda"))
    for name in ("a", "b", "a"):
        cache.lease(spec(name, 2)).release()
    assert counted().value("sdbento_memory_bytes", kind="offloaded") == 2 * GB
    loader.errors, cache.relieve = [torch.OutOfMemoryError()], lambda: None
    cache.lease(spec("c")).release()
    grown = counted().since(before)
    assert grown["sdbento_model_loads_total{outcome=ok}"] == 3
    assert grown["sdbento_model_loads_total{outcome=restored}"] == 1
    assert grown["sdbento_out_of_memory_total"] == 1


# The real thing


def test_the_embedded_model_is_leased_and_ready(tmp_path: Path) -> None:
    settings = load_settings(sd_model="shapes", device="cpu")
    cache = PipelineCache(settings)
    try:
        with cache.lease(Catalog(settings).resolve("shapes")) as pipeline:
            assert pipeline.latent_channels == 4
            assert pipeline.pipe.vae_scale_factor == 8
            assert not pipeline.is_sdxl
            [(name, nbytes, leased)] = cache.loaded()
            assert (name, leased) == ("shapes", True)
            parts = [*pipeline.pipe.components.values(), pipeline.preview_decoder]
            assert nbytes == sum(_nbytes(part) for part in parts)
    finally:
        cache.close()


def _nbytes(part: Any) -> int:
    if not isinstance(part, torch.nn.Module):
        return 0
    return sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
