"""Models loaded before a request needs them: one a caller."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from sdbento.access.caller import Allowance, Caller
from sdbento.doors.a1111.tools.preloads import Preloads
from sdbento.errors import ModelLoadFailed
from tests.support.fake_loader import spec

ALICE, BOB = Caller("alice"), Caller("bob")


class FakeBackend:
    def __init__(self) -> None:
        self.asked: dict[str, Future[Any]] = {}

    def preload(self, spec: Any) -> Future[Any]:
        future = self.asked[spec.name] = Future()
        return future


def begun(preloads: Preloads, backend: Any, caller: Caller, name: str) -> None:
    preloads.begin(caller, spec(name), backend)


def test_who_chooses_again_waits_for_the_last_choice_alone() -> None:
    preloads, backend = Preloads(), FakeBackend()
    begun(preloads, backend, BOB, "c")
    for name in ("a", "b"):
        begun(preloads, backend, ALICE, name)
    assert backend.asked["a"].cancelled()
    assert not backend.asked["b"].done()
    assert not backend.asked["c"].done()  # which is another's


def test_a_key_whose_limits_change_is_the_same_caller() -> None:
    preloads, backend = Preloads(), FakeBackend()
    begun(preloads, backend, ALICE, "a")
    begun(preloads, backend, Caller("alice", Allowance(images_at_once=1)), "b")
    assert backend.asked["a"].cancelled()


def test_a_load_that_fails_is_over() -> None:
    preloads, backend = Preloads(), FakeBackend()
    begun(preloads, backend, ALICE, "a")
    backend.asked["a"].set_exception(ModelLoadFailed("no"))
    begun(preloads, backend, ALICE, "b")
    assert not backend.asked["b"].done()
