"""When requests end, by the work that is left of them."""

from __future__ import annotations

import random
from math import inf

import pytest

from sdbento.engine.cost import ENOUGH
from sdbento.engine.forecast import ends_in_shares, forecast
from sdbento.engine.handle import Handle
from sdbento.engine.planner import Planner
from sdbento.engine.trajectory import Stage
from tests.support.fakes import make_trajectory


def test_requests_of_one_owner_end_one_after_another() -> None:
    assert ends_in_shares([("a", 3.0), ("a", 1.0), ("a", 2.0)]) == [3.0, 4.0, 6.0]


def test_a_light_request_ends_soon_however_much_another_owner_has() -> None:
    assert ends_in_shares([("a", 50.0), ("a", 50.0), ("b", 1.0)]) == [51.0, 101.0, 2.0]


@pytest.mark.parametrize("seed", range(20))
def test_they_end_as_if_everybody_had_had_equal_shares(seed: int) -> None:
    draw = random.Random(seed)
    requests = [(draw.choice("abcd"), float(draw.randint(1, 30))) for _ in range(12)]
    left = dict(enumerate(seconds for _, seconds in requests))
    ended, now = {}, 0.0
    while left:  # a small share for everybody in turn, for the oldest request of each
        for owner in "abcd":
            first = next((i for i in left if requests[i][0] == owner), None)
            if first is None:
                continue
            now += 0.01
            left[first] -= 0.01
            if left[first] < 0.005:
                ended[first] = now
                del left[first]
    expected = [ended[i] for i in range(len(requests))]
    assert ends_in_shares(requests) == pytest.approx(expected, abs=0.1)


def test_what_is_done_does_not_count_and_a_deadline_ends_a_request() -> None:
    def handle(*num_steps: int, owner: str, deadline: float) -> Handle:
        made = [make_trajectory(num, owner=owner, deadline=deadline) for num in num_steps]
        return Handle(made, lambda _: None, lambda _: None)

    a, b = handle(10, 10, 4, owner="a", deadline=90.0), handle(50, owner="b", deadline=130.0)
    a.trajectories[2].error = RuntimeError()  # type: ignore[assignment]  # any will do
    assert a.trajectories[2].finished
    a.trajectories[0].step = 6
    endings = forecast([b, a], lambda one: float(one.current.num_steps - one.step), now=100.0)
    assert [(end.at, end.owner, end.num_images) for end in endings] == [
        (90.0, "a", 3),
        (130.0, "b", 1),
    ]
    for one in (*a.trajectories, *b.trajectories):
        one.deadline = 1000.0
    endings = forecast([b, a], lambda one: float(one.current.num_steps - one.step), now=100.0)
    assert [(end.at, end.owner) for end in endings] == [(128.0, "a"), (164.0, "b")]


def test_nobody_knows_when_a_request_ends_behind_one_that_was_never_timed() -> None:
    new, known, other = (
        Handle(
            [make_trajectory(4, owner=owner, model=model, deadline=1000.0)],
            lambda _: None,
            lambda _: None,
        )
        for owner, model in (("a", "new"), ("a", "known"), ("b", "known"))
    )
    planner = Planner(4)
    key = other.trajectories[0].key
    for _ in range(1 + ENOUGH):  # the first timing is discarded
        planner.cost.observe(key, Stage.STEP, 2, 1.0)
    endings = forecast([new, known, other], planner.known_work, now=100.0)
    assert [ending.owner for ending in endings] == ["b", "a", "a"]
    assert endings[0].at < 1000.0
    assert [ending.at for ending in endings[1:]] == [inf, inf]
