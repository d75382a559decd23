"""What is offloaded from a GPU, for which the CPU stands in here, and what is dropped."""

from __future__ import annotations

import pytest
import torch

from sdbento.models import offload
from sdbento.models.offload import Offloaded
from sdbento.models.pipeline import Pipeline, networks
from tests.support.fake_loader import FakeLoader, control, spec


def test_every_tensor_is_moved(loader: FakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    for wanted in (spec("a"), control("c")):
        loaded = loader(wanted)
        before = [tensor.clone() for part in networks(loaded) for tensor in part.parameters()]
        offloaded = offload.to_host(loaded)
        after = [tensor for part in networks(offloaded) for tensor in part.parameters()]
        assert offloaded is not loaded
        assert all(torch.equal(a, b + 1) for a, b in zip(after, before, strict=True))


def test_offloaded_models_are_dropped_when_the_host_has_no_room(
    loader: FakeLoader, moves: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    offloaded = Offloaded(torch.device("cuda"))
    room = iter([True, True, False, True])
    monkeypatch.setattr(offload, "has_room", lambda nbytes: next(room))
    for name in ("a", "b", "c"):
        offloaded.put(loader(spec(name)))
    assert [name for name in "abc" if offloaded.take(name)] == ["b", "c"]
    monkeypatch.setattr(offload, "has_room", lambda nbytes: True)
    offloaded.put(loader(spec("b")))
    monkeypatch.setattr(offload, "has_room", lambda nbytes: False)
    offloaded.put(loader(spec("d")))
    assert not [name for name in "bd" if offloaded.take(name)]


def test_models_that_cannot_be_pinned_are_dropped(
    loader: FakeLoader, moves: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pipeline: Pipeline) -> Pipeline:
        raise RuntimeError("cannot pin")

    monkeypatch.setattr(offload, "to_host", fail)
    offloaded = Offloaded(torch.device("cuda"))
    offloaded.put(loader(spec("a")))
    assert offloaded.take("a") is None


def test_on_a_cpu_nothing_is_offloaded(loader: FakeLoader) -> None:
    offloaded = Offloaded(torch.device("cpu"))
    offloaded.put(loader(spec("a")))
    assert offloaded.take("a") is None
