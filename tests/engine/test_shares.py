from __future__ import annotations

import pytest

from sdbento.engine.shares import Shares
from sdbento.engine.trajectory import Stage, StepPlan, Trajectory
from tests.support.fakes import make_trajectory


def images(owner: str | None, count: int, side: int = 8) -> list[Trajectory]:
    return [make_trajectory(owner=owner, side=side) for _ in range(count)]


def call(shares: Shares, waiting: list[Trajectory], members: list[Trajectory]) -> None:
    """A call in which each of `members` has a second."""
    shares.update(waiting)
    shares.charge(StepPlan(Stage.STEP, members[0].key, tuple(members)), float(len(members)))


def a_second(_: Trajectory) -> float:
    return 1.0


def owners(queue: list[Trajectory]) -> str:
    return "".join(str(trajectory.owner) for trajectory in queue)


@pytest.mark.parametrize("owner", [None, "a"])
def test_images_of_one_owner_keep_their_order(owner: str | None) -> None:
    queue = images(owner, 9)
    shares = Shares()
    call(shares, queue, queue[:3])
    shares.update(queue)
    assert shares.order(queue, a_second) == queue


def test_images_of_several_owners_take_turns() -> None:
    queue = images("a", 5) + images("b", 2) + images("c", 1)
    shares = Shares()
    shares.update(queue)
    assert owners(shares.order(queue, a_second)) == "abcabaaa"


def test_what_counts_is_seconds_and_not_images() -> None:
    queue = images("a", 3, side=16) + images("b", 9)
    shares = Shares()
    shares.update(queue)
    order = shares.order(queue, lambda trajectory: 4.0 if trajectory.owner == "a" else 1.0)
    assert owners(order) == "abbbbabbbbab"


def test_whoever_had_less_goes_first() -> None:
    a, b = images("a", 3), images("b", 3, side=16)
    shares = Shares()
    call(shares, a + b, a)
    shares.update(a + b)
    assert owners(shares.order(a + b, a_second)) == "bbbaaa"


def test_nobody_is_paid_for_having_been_idle() -> None:
    a, b = images("a", 4), images("b", 4)
    shares = Shares()
    for _ in range(100):
        call(shares, a, a[:2])
    shares.update(a + b)
    assert owners(shares.order(a + b, a_second)) == "bbababaa"  # the last call still counts


def test_leaving_and_coming_back_pays_for_nothing_either() -> None:
    a, b = images("a", 4), images("b", 4, side=16)
    shares = Shares()
    call(shares, a + b, b)
    shares.update(a)
    shares.update(a + b)
    assert owners(shares.order(a + b, a_second)) == "aaaabbbb"


def test_when_nobody_waits_everything_is_forgotten() -> None:
    a, b = images("a", 4), images("b", 4, side=16)
    shares = Shares()
    call(shares, a + b, b)
    shares.update([])
    shares.update(a + b)
    assert owners(shares.order(a + b, a_second)) == "abababab"


def test_an_owner_whose_images_all_take_part_gathers_no_claim() -> None:
    a, b = images("a", 9), images("b", 1)
    shares = Shares()
    for _ in range(100):
        call(shares, a + b, a[:3] + b)
    b = images("b", 9)
    shares.update(a + b)
    assert owners(shares.order(a + b, a_second)) == "ab" * 9


def test_an_owner_with_images_left_out_keeps_its_claim() -> None:
    a, b = images("a", 9), images("b", 2)
    shares = Shares()
    for _ in range(2):
        call(shares, a + b, a[:3] + b[:1])
    shares.update(a + b)
    assert owners(shares.order(a + b, a_second))[:2] == "bb"


def test_clocks_of_those_who_are_gone_are_not_kept_for_ever() -> None:
    shares = Shares()
    stays = images("stays", 2)
    for i in range(1000):
        guest = images(str(i), 1, side=16)
        call(shares, stays + guest, guest)
        call(shares, stays, stays)
    assert len(shares._clocks) < 5


def test_others_get_as_much_as_oneself_and_no_more_than_they_need() -> None:
    a, b, c = images("a", 1), images("b", 1), images("c", 1, side=16)
    shares = Shares()
    call(shares, a + b + c, c)
    shares.update(a + b + c)
    assert shares.seconds_for_others("a", 5.0, {"b": 3.0, "c": 9.0}) == 3.0 + 4.0
    assert shares.seconds_for_others("a", 0.5, {"b": 3.0, "c": 9.0}) == 0.5
    assert shares.seconds_for_others("a", 5.0, {}) == 0.0
