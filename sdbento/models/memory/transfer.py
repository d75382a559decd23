"""Tensors from the host to a GPU and back, beside the steps that it computes.

A plain `tensor.to(device)` queues behind the kernels of the running step, tensor by tensor: a model
has thousands, so that loading beside traffic would take minutes. Here all copies go through a
stream of their own and pinned memory, which the GPU reads and writes without the host's help:

    to the GPU    file -> one of two pinned buffers, in turn -> memory that was allocated before
    to the host   GPU -> pinned chunks, of which the tensors become views

The memory on the GPU belongs to the caller's stream. It may have been somebody else's just before,
whose kernels are still queued: the copies wait for these, once, and for nothing else. Callers get
tensors whose copies have ended. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

STAGING = 64 * 2**20  # bytes of each of the two buffers
# Bytes of a chunk of host memory. torch rounds every pinned allocation up to a power of two.
CHUNK = 256 * 2**20


def move(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Move all parameters and buffers to `device`; they keep their strides, and stay tied.

    Where it fails, nothing has moved. Raises torch.OutOfMemoryError, or RuntimeError where no more
    memory can be pinned.
    """
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    moved = copied([tensor.data for tensor in tensors], device)
    for tensor, data in zip(tensors, moved, strict=True):
        tensor.data = data


def copied(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """`tensors` on `device`, with equal strides; those that are there already, as they are.

    Two that are the same piece of memory are so afterwards.
    """
    distinct = {_place(tensor): tensor for tensor in tensors if tensor.device != device}
    if not distinct:
        return list(tensors)
    sources = [_dense(tensor) for tensor in distinct.values()]
    copy = _to_host if device.type == "cpu" else _to_gpu
    made = dict(zip(distinct, copy(sources, device), strict=True))
    return [made.get(_place(tensor), tensor) for tensor in tensors]


def free_pinned() -> None:
    """Give pinned memory that nothing uses back to the system; torch keeps it for the next time."""
    torch._C._host_emptyCache()


class SideStream:
    """The stream of a GPU that only copies use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device)

    def wait_for_caller(self) -> None:
        """What is copied from here on waits for everything that the caller's stream has queued."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy between pinned memory and the GPU, and return at once."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        """An event whose `synchronize` waits for the copies that have been queued so far."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def finish(self) -> None:
        """Wait for all copies, and for nothing else that the GPU does."""
        self._stream.synchronize()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all copies: torch has 32, and gives them out again, those of others among them."""
    return torch.cuda.Stream(device)


def _to_gpu(sources: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    targets = [torch.empty_like(source, device=device) for source in sources]
    with _side_stream(device) as stream:
        staging = _Staging(stream)
        for target, source in zip(targets, sources, strict=True):
            if source.is_pinned():
                stream.copy(_flat(target), _flat(source))
            else:
                staging.copy(_flat(target), _flat(source))
    return targets


def _to_host(sources: Sequence[Tensor], _: torch.device) -> list[Tensor]:
    targets = list(_views_of_chunks(sources))
    with _side_stream(sources[0].device) as stream:
        for target, source in zip(targets, sources, strict=True):
            stream.copy(_flat(target), _flat(source))
    return targets


@contextmanager
def _side_stream(device: torch.device) -> Iterator[SideStream]:
    """A stream for the copies into memory that is allocated by now; at the end they are done.

    After an error as well: the memory would be reused while it is still being written.
    """
    stream = SideStream(device)
    stream.wait_for_caller()
    try:
        yield stream
    finally:
        stream.finish()


class _Staging:
    """Two pinned buffers: while one is copied from, the other is filled."""

    def __init__(self, stream: SideStream) -> None:
        self._stream = stream
        self._buffer, self._other = _pinned(STAGING), _pinned(STAGING)
        self._in_flight: torch.cuda.Event | None = None  # the copies from `_other`
        self._used = 0  # bytes of `_buffer`

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Bytes to bytes, in as many pieces as the buffers need; small ones share a buffer."""
        done = 0
        while done < len(source):
            if self._used == STAGING:
                self._swap()
            length = min(STAGING - self._used, len(source) - done)
            piece = self._buffer[self._used : self._used + length]
            piece.copy_(source[done : done + length])
            self._stream.copy(target[done : done + length], piece)
            self._used += length
            done += length

    def _swap(self) -> None:
        queued = self._stream.mark()
        if self._in_flight is not None:
            self._in_flight.synchronize()
        self._buffer, self._other = self._other, self._buffer
        self._in_flight, self._used = queued, 0


def _views_of_chunks(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Pinned memory for each of `tensors`, with its strides; many share a chunk."""
    left = sum(map(_room, tensors))
    chunk = torch.empty(0, dtype=torch.uint8)
    for tensor in tensors:
        if len(chunk) < _room(tensor):
            chunk = _pinned(max(_room(tensor), min(CHUNK, left)))
        piece = chunk[: tensor.numel() * tensor.element_size()].view(tensor.dtype)
        yield piece.as_strided(tensor.shape, tensor.stride())
        chunk = chunk[_room(tensor) :]
        left -= _room(tensor)


def _room(tensor: Tensor) -> int:
    """Its bytes, rounded up so that what follows is aligned for any type."""
    return -(-tensor.numel() * tensor.element_size() // 16) * 16


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same piece of memory."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _dense(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it where its strides leave gaps or overlap."""
    like = torch.empty_like(tensor, device="meta")
    return tensor if like.stride() == tensor.stride() else tensor.clone()


def _flat(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor, in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
