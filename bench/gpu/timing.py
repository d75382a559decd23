"""How seconds are measured: after a warm-up, repeated, the median; on a GPU by CUDA events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

GB = 1e9


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Marks:
    """Moments on the device's own clock; reading them waits for the device, taking them does not.

    On a CPU, which has no queue, they are the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def take(self) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def after_step(self, *_: object) -> dict[str, Any]:
        """Takes a mark as a callback of the stock pipelines, and changes nothing in them."""
        self.take()
        return {}

    def intervals(self) -> list[float]:
        """Seconds between one mark and the next."""
        synchronize(self._device)
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._device.type != "cuda":
            return [after - before for before, after in pairs]
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def median_seconds(
    call: Callable[[], Any],
    device: torch.device,
    repeats: int = 10,
    warmups: int = 3,
    in_a_row: int = 1,
) -> float:
    """Median seconds of one `call`, from its start to the end of what it asked of the device.

    `in_a_row`: calls queued at once, so that launching is no part of the time of a short call.
    """
    for _ in range(warmups):
        call()
    synchronize(device)
    times = []
    for _ in range(repeats):
        marks = Marks(device)
        marks.take()
        for _ in range(in_a_row):
            call()
        marks.take()
        times += [seconds / in_a_row for seconds in marks.intervals()]
    return median(times)


def wall_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds on the host's clock until the device has nothing left to do."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float:
    """Peak memory of tensors since `reset_peak`, in GB; 0 on a CPU, which torch does not count."""
    return torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else 0.0


def reserved_gb(device: torch.device) -> float:
    """Memory that torch has taken from the device, in GB, the pools of CUDA graphs included."""
    return torch.cuda.memory_reserved(device) / GB if device.type == "cuda" else 0.0


@contextmanager
def true_fp32() -> Iterator[None]:
    """Full precision, for references: by default torch lets convolutions round to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
