"""Work that a device was given: when it is done, how long it took, what the host does afterwards.

On a CPU everything is done when it was given. A long plan pauses there between two operators, so
that short ones of others can run. Self-attention of a large image is a single operator that takes
seconds: it is computed for some of its queries at a time, which changes nothing, since queries do
not depend on each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sdbento.engine.trajectory import Launched, StepResult, Trajectory
from sdbento.errors import SDBentoError

Failures = dict[Trajectory, SDBentoError]
# What is left for the host once the device is done; returns the trajectories that have failed.
Finish = Callable[[], Failures]

PAUSE_EVERY = 0.2  # seconds of computing from one pause to the next, at least
QUERIES = 1024  # of attention that are computed together, or a multiple of it
PRODUCTS = 2e9  # multiplications in a piece of attention: about a tenth of a second


def on_device(
    device: torch.device, work: Callable[[], Finish], pause: Callable[[], None] | None = None
) -> Launched:
    """Give `work` to the device. Raises what `work` raises, and what `pause` does, which is called
    now and then where the host computes."""
    if device.type != "cuda":
        return _compute(work, pause)
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True, blocking=True)  # waiting for it occupies no core
    begin.record()
    finish = work()
    end.record()
    return _OnStream(begin, end, finish)


def _compute(work: Callable[[], Finish], pause: Callable[[], None] | None) -> Launched:
    started = time.perf_counter()
    if pause is None:
        finish, paused = work(), 0.0
    else:
        with _Pauses(pause) as pauses:
            finish = work()
        paused = pauses.seconds
    return _Computed(time.perf_counter() - started - paused, finish)


@contextmanager
def without_pauses() -> Iterator[None]:
    """Within this context work does not pause: no other plan may run in its midst."""
    with torch._C.DisableTorchFunction():
        yield


@dataclass(frozen=True)
class _Computed:
    seconds: float
    finish: Finish

    @property
    def done(self) -> bool:
        return True

    def wait(self) -> StepResult:
        return StepResult(self.seconds, self.finish())


@dataclass(frozen=True)
class _OnStream:
    """Between two events of the current stream: its seconds are the device's."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    finish: Finish

    @property
    def done(self) -> bool:
        try:
            return bool(self.end.query())
        except RuntimeError:  # of a device that has failed; `wait` reports it
            return True

    @torch.inference_mode()
    def wait(self) -> StepResult:
        self.end.synchronize()
        return StepResult(self.begin.elapsed_time(self.end) / 1000, self.finish())


class _Pauses(TorchFunctionMode):
    """Within this context operators call `pause` now and then. `seconds`: what it took in all."""

    def __init__(self, pause: Callable[[], None]) -> None:
        super().__init__()
        self.seconds = 0.0
        self._pause = pause
        self._resumed = time.perf_counter()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        self._pause_if_due()
        if func is scaled_dot_product_attention and _is_plain(args, kwargs or {}):
            return self._attention(*args[:3], **kwargs)
        return func(*args, **(kwargs or {}))

    def _pause_if_due(self) -> None:
        now = time.perf_counter()
        if now - self._resumed < PAUSE_EVERY:
            return
        self._pause()
        self._resumed = time.perf_counter()
        self.seconds += self._resumed - now

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """[B, H, L, D], with a pause after every piece of the L queries."""
        per_query = 2 * key.numel() * (query.shape[1] // key.shape[1])
        size = max(QUERIES, int(PRODUCTS / per_query) // QUERIES * QUERIES)
        if query.shape[2] <= size:
            return scaled_dot_product_attention(query, key, value, **options)
        made = []
        for piece in query.split(size, dim=2):
            made.append(scaled_dot_product_attention(piece, key, value, **options))
            self._pause_if_due()
        return torch.cat(made, dim=2)


def _is_plain(args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether nothing but the keys and values says what a query makes of them."""
    return (
        len(args) == 3
        and args[0].dim() == 4
        and options.get("attn_mask") is None
        and not options.get("is_causal")
    )
