"""Limits of keys and shares of all, with a clock that the tests set."""

from __future__ import annotations

from collections import Counter

import pytest

from sdbento.access import limits
from sdbento.access.caller import ANYBODY, Allowance, Caller
from sdbento.access.limits import ImagesAtOnce, RequestRate, has_place, has_share, with_reserve
from sdbento.errors import Forbidden, LimitReached, Overloaded


def soon(num_images: int) -> float:
    """Seconds until so many images have ended."""
    return float(num_images)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def refusal(rate: RequestRate, caller: Caller) -> float | None:
    """Seconds until the next try, if the request is refused."""
    try:
        rate.count(caller)
    except LimitReached as error:
        return error.retry_after
    return None


def test_a_minute_never_has_more_requests_than_allowed() -> None:
    clock, caller = Clock(), Caller("a", Allowance(requests_per_minute=3))
    rate = RequestRate(clock)
    admitted: list[float] = []
    for tick in range(200):
        clock.now = 1000.0 + tick * 7
        while refusal(rate, caller) is None:
            admitted.append(clock.now)
    for start in admitted:
        assert len([t for t in admitted if start <= t < start + 60.0]) <= 3
    assert len(admitted) >= 60


def test_retry_after_is_the_moment_from_which_it_works() -> None:
    clock, caller = Clock(), Caller("a", Allowance(requests_per_minute=2))
    rate = RequestRate(clock)
    rate.count(caller)
    clock.now += 25.5
    rate.count(caller)
    clock.now += 10
    assert refusal(rate, caller) == 24.5
    clock.now += 24.499
    assert refusal(rate, caller) is not None
    clock.now += 0.001
    assert refusal(rate, caller) is None


def test_refused_requests_do_not_count() -> None:
    clock, caller = Clock(), Caller("a", Allowance(requests_per_minute=1))
    rate = RequestRate(clock)
    rate.count(caller)
    for _ in range(50):
        clock.now += 1
        with pytest.raises(LimitReached):
            rate.count(caller)
    clock.now += 10
    rate.count(caller)


def test_keys_are_counted_apart_and_those_without_a_limit_not_at_all() -> None:
    rate = RequestRate(Clock())
    limit = Allowance(requests_per_minute=1)
    rate.count(Caller("a", limit))
    rate.count(Caller("b", limit))
    for _ in range(1000):
        rate.count(Caller("c"))
        rate.count(ANYBODY)
    assert rate._times.keys() == {"a", "b"}


def test_images_at_once_are_given_back_however_a_request_ends() -> None:
    caller, images = Caller("a", Allowance(images_at_once=4)), ImagesAtOnce()

    def fails() -> None:
        with images.hold(caller, 3, soon):
            with images.hold(caller, 1, soon):
                pass
            with images.hold(Caller("b", Allowance(images_at_once=4)), 4, soon):
                pass
            with images.hold(caller, 2, soon):
                pytest.fail("admitted")

    with pytest.raises(LimitReached, match="3 images") as refused:
        fails()
    assert refused.value.retry_after == 1.0  # one image too many
    with images.hold(caller, 4, soon):
        pass
    assert not images._images


def test_what_can_never_be_is_not_told_to_try_again() -> None:
    with pytest.raises(Forbidden) as refused:
        with ImagesAtOnce().hold(Caller("a", Allowance(images_at_once=2)), 3, soon):
            pytest.fail("admitted")
    assert refused.value.retry_after is None


def test_one_client_without_a_key_may_have_all_and_every_newcomer_gets_in() -> None:
    taken, limit = Counter[str | None](), 104
    for address, most in (("a", 104), ("b", 5), ("c", 5), ("d", 4), ("e", 4)):
        client = Caller(address=address)
        while has_place(client, taken, limit):
            taken[address] += 1
        assert taken[address] == most
    for i in range(20):
        assert has_place(Caller(address=str(i)), taken, limit)
        taken[str(i)] += 1
    assert not has_place(Caller("key"), taken, limit)  # where all have one key, or none
    assert not has_place(ANYBODY, taken, limit)


def test_clients_without_keys_come_to_equal_parts_when_all_want_everything() -> None:
    taken, limit = Counter[str | None](["a"] * 104), 104
    clients = [Caller(address=address) for address in "abcd"]
    for _ in range(2000):
        for client in clients:
            while has_place(client, taken, limit):
                taken[client.owner] += 1
        taken[max(taken, key=taken.__getitem__)] -= 1  # all images take as long: theirs end next
        assert taken.total() <= with_reserve(limit)
    assert max(taken.values()) - min(taken.values()) <= 1
    assert taken.total() >= limit - 1


@pytest.mark.parametrize("limit", [1, 2, 3, 104])
def test_however_many_clients_come_their_number_is_bounded(limit: int) -> None:
    taken = Counter[str | None]()
    for i in range(5 * limit):
        client = Caller(address=str(i))
        while has_place(client, taken, limit):
            taken[client.owner] += 1
    assert limit < taken.total() <= with_reserve(limit)


def test_whose_share_is_taken_is_told_from_what_is_full() -> None:
    alone, both = Counter[str | None]("aaaa"), Counter[str | None]("aaaab")
    client = Caller(address="a")

    def kind(caller: Caller, taken: Counter[str | None]) -> type[Overloaded]:
        return type(limits.refusal(caller, taken, 4, what="the queue", full="the queue is full"))

    assert kind(client, alone) is Overloaded
    assert kind(client, both) is LimitReached
    assert kind(Caller(address="c"), both) is Overloaded
    assert kind(Caller("a", shares=True), Counter("aab")) is LimitReached
    assert kind(Caller("a", shares=True), both) is Overloaded


@pytest.mark.parametrize("num_keys", [1, 2, 3, 7])
def test_keys_that_want_everything_leave_room_for_one_more(num_keys: int) -> None:
    taken, limit = [0] * num_keys, 100
    while free := [i for i in range(num_keys) if has_share(taken[i], sum(taken), limit)]:
        taken[min(free, key=taken.__getitem__)] += 1
    assert max(taken) - min(taken) <= 1
    assert abs(taken[0] - limit / (num_keys + 1)) <= 1
    assert has_share(0, sum(taken), limit)
