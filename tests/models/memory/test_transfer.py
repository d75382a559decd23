"""Copies between host and GPU. The CPU stands in for the GPU, with a stream that is as late as one
may be: it copies only when somebody waits for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdbento.models.memory import transfer

HERE = torch.device("cpu", 0)  # not where tensors are, which is the CPU without a number


class LateStream:
    """Copies when it is waited for, and notes what happens in `events`."""

    events: list[str]

    def __init__(self, _: torch.device) -> None:
        self._queue: list[tuple[Tensor, Tensor]] = []

    def wait_for_caller(self) -> None:
        self.events.append("wait for caller")

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.events.append("copy")
        self._queue.append((target, source))

    def mark(self) -> LateEvent:
        return LateEvent(self, len(self._queue))

    def finish(self) -> None:
        self.events.append("finish")
        self.catch_up(len(self._queue))

    def catch_up(self, count: int) -> None:
        for i, (target, source) in enumerate(self._queue[:count]):
            target.copy_(source)
            self._queue[i] = (torch.empty(0), torch.empty(0))


class LateEvent:
    def __init__(self, stream: LateStream, count: int) -> None:
        self._stream, self._count = stream, count

    def synchronize(self) -> None:
        self._stream.catch_up(self._count)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each piece of pinned memory."""
    sizes: list[int] = []

    def allocate(nbytes: int) -> Tensor:
        sizes.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(transfer, "_pinned", allocate)
    return sizes


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    noted: list[str] = []
    monkeypatch.setattr(transfer, "SideStream", LateStream)
    monkeypatch.setattr(LateStream, "events", noted, raising=False)
    return noted


@pytest.fixture(params=["to the GPU", "to the host"])
def _direction(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "to the GPU":
        monkeypatch.setattr(transfer, "_to_host", transfer._to_gpu)


both_ways = pytest.mark.usefixtures("_direction", "pinned", "events")


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(7, 1000, generator=generator)
    images = torch.randn(3, 5, 8, 8, generator=generator).to(memory_format=torch.channels_last)
    return [
        plain,
        images,
        images.permute(1, 0, 2, 3),
        plain[:, ::3],
        plain.bfloat16(),
        torch.arange(9),
        torch.tensor(True),
        torch.tensor(2.5, dtype=torch.float64),
        torch.empty(0, 4),
        plain.to(torch.float8_e4m3fn),
    ]


@both_ways
@pytest.mark.parametrize("nbytes", [48, 1024, 2**20])
def test_bits_and_strides_are_kept_whatever_the_buffers_hold(
    nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "STAGING", nbytes)
    monkeypatch.setattr(transfer, "CHUNK", nbytes)
    given = tensors()
    for source, target in zip(given, transfer.copied(given, HERE), strict=True):
        assert target is not source
        assert (target.dtype, target.shape) == (source.dtype, source.shape)
        assert target.stride() == torch.empty_like(source).stride()
        assert torch.equal(bits(target), bits(source))


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@both_ways
def test_tied_parameters_move_once_and_stay_tied(events: list[str]) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.words.weight
            self.again = nn.Parameter(self.words.weight.data)
            self.register_buffer("mean", torch.ones(3))

    module, parameter = Tied(), None
    parameter, before = module.head.weight, module.head.weight.data_ptr()
    transfer.move([module, module], HERE)
    assert events.count("copy") == 2
    assert module.head.weight is module.words.weight is parameter
    assert module.head.weight.data_ptr() == module.again.data_ptr() != before
    assert module.get_buffer("mean").tolist() == [1, 1, 1]


@both_ways
def test_copies_begin_once_all_memory_is_there_and_the_caller_has_been_waited_for(
    events: list[str],
) -> None:
    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
        ) -> Any:
            meta = (kwargs or {}).get("device") == torch.device("meta")
            if function.overloadpacket is torch.ops.aten.empty_like and not meta:
                events.append("allocate")
            return function(*args, **(kwargs or {}))

    given = [torch.ones(3), torch.ones(4)]
    with Allocations():  # type: ignore[no-untyped-call]
        transfer.copied(given, HERE)
    order = [event for event in events if event != "allocate"]
    assert order == ["wait for caller", "copy", "copy", "finish"]
    assert "allocate" not in events[events.index("wait for caller") :]


@both_ways
def test_after_an_error_nothing_has_moved_and_no_copy_is_left(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Linear(2, 2)
    before = [parameter.data_ptr() for parameter in module.parameters()]

    def fail(stream: LateStream, target: Tensor, source: Tensor) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(LateStream, "copy", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        transfer.move([module], HERE)
    assert [parameter.data_ptr() for parameter in module.parameters()] == before
    assert events[-1] == "finish"


def test_what_is_there_already_is_not_copied(events: list[str]) -> None:
    given = [torch.ones(3)]
    assert transfer.copied(given, torch.device("cpu"))[0] is given[0]
    assert events == []


@pytest.mark.usefixtures("events")
def test_pinned_memory_comes_in_chunks(pinned: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK", 1024)
    given = [torch.zeros(n, dtype=torch.uint8) for n in (100, 2000, *[300] * 4)]
    transfer.copied(given, HERE)
    assert pinned == [1024, 2000, 1024, 304]


@pytest.mark.usefixtures("events")
def test_what_is_pinned_is_copied_without_a_detour(
    events: list[str], pinned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_to_host", transfer._to_gpu)
    monkeypatch.setattr(transfer, "STAGING", 16)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    transfer.copied([torch.zeros(100)], HERE)
    assert events.count("copy") == 1


def test_a_stream_of_ones_own_is_used_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Stream:
        def __init__(self, device: Any) -> None:
            calls.append(("stream", device))

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args: calls.append((name, *args))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: calls.append("whole device"))
    device = torch.device("cuda", 0)
    stream = transfer.SideStream(device)
    stream.wait_for_caller()
    stream.finish()
    assert calls == [("stream", device), ("wait_stream", "the caller's"), ("synchronize",)]
