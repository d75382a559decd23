"""What is offloaded from a GPU, for which the CPU stands in here, and what is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from sdbento.models.memory import offload
from sdbento.models.memory.offload import Offloaded
from sdbento.models.pipeline import Resident, networks
from tests.support.device_errors import AcceleratorError
from tests.support.fake_loader import FakeLoader, control, spec


def test_every_tensor_is_moved(loader: FakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    def add_one(modules: Iterable[nn.Module], device: torch.device) -> None:
        assert device == torch.device("cpu")
        for tensor in (tensor for module in modules for tensor in module.parameters()):
            tensor.data = tensor.data + 1

    monkeypatch.setattr(offload, "move", add_one)
    for wanted in (spec("a"), control("c")):
        loaded = loader(wanted)
        before = [tensor.clone() for part in networks(loaded) for tensor in part.parameters()]
        offloaded = offload.to_host(loaded)
        after = [tensor for part in networks(offloaded) for tensor in part.parameters()]
        assert offloaded is not loaded
        assert all(torch.equal(a, b + 1) for a, b in zip(after, before, strict=True))


class Host:
    """Host memory for two models of 1 GB. What is dropped still fills it until torch gives pinned
    memory back."""

    def __init__(self, offloaded: Offloaded) -> None:
        self._offloaded = offloaded
        self._held, self._capacity = 0, 2 * 10**9

    def to_host(self, resident: Resident) -> Resident:
        self._held += resident.nbytes
        return resident

    def has_room(self, nbytes: int) -> bool:
        return self._held + nbytes <= self._capacity

    def free_pinned(self) -> None:
        self._held = sum(kept.nbytes for kept in self._offloaded._offloaded.values())


def test_the_oldest_are_dropped_when_the_host_has_no_room(
    loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    offloaded = Offloaded(torch.device("cuda"))
    host = Host(offloaded)
    for name in ("to_host", "has_room", "free_pinned"):
        monkeypatch.setattr(offload, name, getattr(host, name))
    monkeypatch.setattr(offload, "to_device", lambda resident, device: resident)
    for name in ("a", "b", "c"):
        offloaded.put(loader(spec(name)))
    assert [name for name in "abc" if offloaded.take(name)] == ["b", "c"]
    for name in ("a", "b"):  # in the memory of those that have left
        offloaded.put(loader(spec(name)))
    offloaded.put(loader(spec("d", gigabytes=3.0)))
    assert not [name for name in "abd" if offloaded.take(name)]


@pytest.mark.usefixtures("moves")
def test_models_that_cannot_be_pinned_are_dropped(
    loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "to_host", failing(RuntimeError("cannot pin")))
    offloaded = Offloaded(torch.device("cuda"))
    offloaded.put(loader(spec("a")))
    assert offloaded.take("a") is None


@pytest.mark.usefixtures("moves")
def test_a_gpu_that_fails_while_a_model_leaves_is_reported(
    loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "to_host", failing(AcceleratorError("CUDA error: a bad address")))
    with pytest.raises(AcceleratorError):
        Offloaded(torch.device("cuda")).put(loader(spec("a")))


def failing(error: Exception) -> Callable[[Resident], Resident]:
    def fail(resident: Resident) -> Resident:
        raise error

    return fail


def test_on_a_cpu_nothing_is_offloaded(loader: FakeLoader) -> None:
    offloaded = Offloaded(torch.device("cpu"))
    offloaded.put(loader(spec("a")))
    assert offloaded.take("a") is None
