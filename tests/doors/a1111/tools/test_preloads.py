"""Models loaded before a request needs them: one a caller, and leased by nobody afterwards."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, cast

from sdbento.access.caller import Allowance, Caller
from sdbento.doors.a1111.tools.preloads import Preloads
from sdbento.errors import ModelLoadFailed
from sdbento.models.cache import PipelineCache
from sdbento.models.leases import Lease
from tests.support.fake_loader import spec

ALICE, BOB = Caller("alice"), Caller("bob")


class FakePipelines:
    def __init__(self) -> None:
        self.asked: dict[str, Future[Lease]] = {}
        self.released: list[str] = []

    def acquire(self, *specs: Any) -> Future[Lease]:
        future = self.asked[specs[0].name] = Future()
        return future

    def load(self, name: str) -> None:
        self.asked[name].set_result(Lease((), lambda _: self.released.append(name)))


def begun(preloads: Preloads, pipelines: FakePipelines, caller: Caller, name: str) -> None:
    preloads.begin(caller, spec(name), cast(PipelineCache, pipelines))


def test_a_loaded_model_is_leased_by_nobody() -> None:
    pipelines = FakePipelines()
    begun(Preloads(), pipelines, ALICE, "a")
    pipelines.load("a")
    assert pipelines.released == ["a"]


def test_who_chooses_again_waits_for_the_last_choice_alone() -> None:
    preloads, pipelines = Preloads(), FakePipelines()
    begun(preloads, pipelines, BOB, "c")
    for name in ("a", "b"):
        begun(preloads, pipelines, ALICE, name)
    assert pipelines.asked["a"].cancelled()
    assert not pipelines.asked["b"].done()
    assert not pipelines.asked["c"].done()  # which is another's


def test_a_key_whose_limits_change_is_the_same_caller() -> None:
    preloads, pipelines = Preloads(), FakePipelines()
    begun(preloads, pipelines, ALICE, "a")
    begun(preloads, pipelines, Caller("alice", Allowance(images_at_once=1)), "b")
    assert pipelines.asked["a"].cancelled()


def test_a_load_that_fails_is_over() -> None:
    preloads, pipelines = Preloads(), FakePipelines()
    begun(preloads, pipelines, ALICE, "a")
    pipelines.asked["a"].set_exception(ModelLoadFailed("no"))
    begun(preloads, pipelines, ALICE, "b")
    pipelines.load("b")
    assert pipelines.released == ["b"]
