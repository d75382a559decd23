"""Memory accounting: who holds what, and who would make room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdbento.models.budget import Budget


def budget(capacity: int = 10, **held: int) -> Budget:
    made = Budget(capacity)
    for name, nbytes in held.items():
        made.reserve(name, nbytes)
    return made


def test_what_is_reserved_is_used_until_it_is_released() -> None:
    held = budget(a=4, b=3)
    assert (held.used, held.available) == (7, 3)
    assert held.release("a") == 4
    assert held.used == 3
    assert "a" not in held


def test_a_measured_size_replaces_the_estimate() -> None:
    held = budget(a=4)
    held.reserve("a", 12)
    assert held.nbytes("a") == 12
    assert held.available == -2


def test_nobody_makes_room_where_there_is_room() -> None:
    assert budget(a=4).victims(6) == []


def test_the_least_recently_used_makes_room() -> None:
    held = budget(a=4, b=3, c=3)
    held.pin("a")
    held.unpin("a")
    assert held.names() == ["b", "c", "a"]
    assert held.victims(3) == ["b"]
    assert held.victims(4) == ["b", "c"]


def test_the_end_of_a_use_counts_as_a_use() -> None:
    held = budget(a=4, b=4)
    held.pin("a")
    held.pin("b")
    held.unpin("b")
    held.unpin("a")
    assert held.victims(4) == ["b"]


def test_what_is_pinned_stays_until_the_last_pin_is_taken_back() -> None:
    held = budget(a=6, b=4)
    held.pin("a")
    held.pin("a")
    assert held.victims(8) is None
    held.unpin("a")
    assert held.pinned("a")
    held.unpin("a")
    assert held.victims(8) == ["b", "a"]


def test_what_is_to_be_spared_makes_no_room() -> None:
    held = budget(a=4, b=3, c=3)
    assert held.victims(3, spare={"a"}) == ["b"]
    assert held.victims(7, spare={"a"}) is None


def test_what_outgrew_the_budget_makes_room_for_nothing() -> None:
    held = budget(a=4, b=8)
    held.pin("b")
    assert held.victims(0) == ["a"]


def test_a_pin_cannot_be_taken_back_twice() -> None:
    held = budget(a=1)
    with pytest.raises(ValueError, match="a is not pinned"):
        held.unpin("a")


@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=8),
    st.integers(0, 30),
    st.integers(1, 30),
)
def test_victims_make_just_enough_room_and_are_never_pinned(
    holdings: list[tuple[int, bool]], nbytes: int, capacity: int
) -> None:
    held = budget(capacity)
    for i, (size, pinned) in enumerate(holdings):
        held.reserve(str(i), size)
        if pinned:
            held.pin(str(i))
    victims = held.victims(nbytes)
    free = sum(held.nbytes(name) for name in held.names() if not held.pinned(name))
    if victims is None:
        assert free + held.available < nbytes
        return
    assert not any(held.pinned(name) for name in victims)
    for name in victims:
        assert held.available < nbytes
        held.release(name)
    assert held.available >= nbytes
