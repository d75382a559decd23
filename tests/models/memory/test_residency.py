"""Bookkeeping of memory: resident models, their sizes, and which would be evicted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdbento.models.memory.residency import Residency


def holding(capacity: int = 10, **sizes: int) -> Residency[str]:
    made: Residency[str] = Residency(capacity)
    for key, nbytes in sizes.items():
        made.add(key, f"item {key}", nbytes)
    return made


def keys(residency: Residency[str]) -> list[str]:
    return [key for key, *_ in residency.entries()]


def test_a_resident_model_is_used_until_it_is_evicted() -> None:
    residency = holding(a=4, b=3)
    assert (residency.used, residency.available) == (7, 3)
    assert residency.evict(["a"]) == ["item a"]
    assert residency.used == 3
    assert not residency.has_all(["a"])


def test_a_measured_size_replaces_the_estimate() -> None:
    residency = holding()
    residency.reserve("a", 4)
    assert (residency.used, residency.entries()) == (4, [])
    residency.add("a", "item a", 12)
    assert residency.entries() == [("a", 12, False)]
    assert residency.nbytes("a") == 12
    assert residency.available == -2


def test_a_cancelled_reservation_no_longer_counts_but_an_added_model_stays() -> None:
    residency = holding()
    for key in "ab":
        residency.reserve(key, 4)
    residency.add("a", "item a", 3)
    for key in "abc":
        residency.cancel(key)
    assert residency.entries() == [("a", 3, False)]
    assert residency.used == 3


def test_a_reservation_is_neither_resident_nor_evictable() -> None:
    residency = holding()
    residency.reserve("a", 8)
    assert not residency.has_all(["a"])
    assert residency.evictable() == []
    assert residency.victims(4) is None


def test_nothing_is_evicted_where_there_is_room() -> None:
    assert holding(a=4).victims(6) == []


def test_the_least_recently_used_is_evicted_first() -> None:
    residency = holding(a=4, b=3, c=3)
    assert residency.lock(["a"]) == ("item a",)
    residency.unlock(["a"])
    assert keys(residency) == ["b", "c", "a"]
    assert residency.victims(3) == ["b"]
    assert residency.victims(4) == ["b", "c"]


def test_the_end_of_a_use_counts_as_a_use() -> None:
    residency = holding(a=4, b=4)
    residency.lock(["a", "b"])
    residency.unlock(["b", "a"])
    assert residency.victims(4) == ["b"]


def test_a_locked_model_stays_until_its_last_lock_is_undone() -> None:
    residency = holding(a=6, b=4)
    residency.lock(["a", "a"])
    assert residency.victims(8) is None
    residency.unlock(["a"])
    assert ("a", 6, True) in residency.entries()
    residency.unlock(["a"])
    assert residency.victims(8) == ["b", "a"]


def test_spared_models_are_not_evicted() -> None:
    residency = holding(a=4, b=3, c=3)
    assert residency.victims(3, spare={"a"}) == ["b"]
    assert residency.victims(7, spare={"a"}) is None
    assert residency.evictable(spare={"b"}) == ["a", "c"]


def test_a_model_that_outgrew_its_reservation_evicts_others() -> None:
    residency = holding(a=4, b=8)
    residency.lock(["b"])
    assert residency.victims(0) == ["a"]


def test_a_lock_cannot_be_undone_twice() -> None:
    residency = holding(a=1)
    with pytest.raises(ValueError, match="a is not locked"):
        residency.unlock(["a"])


@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=8),
    st.integers(0, 30),
    st.integers(1, 30),
)
def test_victims_make_just_enough_room_and_are_never_locked(
    items: list[tuple[int, bool]], nbytes: int, capacity: int
) -> None:
    residency = holding(capacity)
    for i, (size, locked) in enumerate(items):
        residency.add(str(i), f"item {i}", size)
        if locked:
            residency.lock([str(i)])
    victims = residency.victims(nbytes)
    free = sum(size for _, size, locked in residency.entries() if not locked)
    if victims is None:
        assert free + residency.available < nbytes
        return
    assert not {key for key, _, locked in residency.entries() if locked} & {*victims}
    for key in victims:
        assert residency.available < nbytes
        residency.evict([key])
    assert residency.available >= nbytes


def test_an_item_can_grow_and_is_evicted_with_all_that_it_takes() -> None:
    residency = Residency[str](100)
    residency.add("a", "A", 40)
    residency.grow("a", 30)
    residency.grow("gone", 30)
    assert (residency.available, residency.nbytes("a")) == (30, 70)
    residency.grow("a", -10)
    residency.evict(["a"])
    assert residency.available == 100
