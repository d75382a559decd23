"""Work that a device was given: when it is done, how long it took, what the host does afterwards.

On a CPU everything is done when it was given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sdbento.engine.trajectory import Launched, StepResult, Trajectory
from sdbento.errors import SDBentoError

Failures = dict[Trajectory, SDBentoError]
# What is left for the host once the device is done; returns the trajectories that have failed.
Finish = Callable[[], Failures]


def on_device(device: torch.device, work: Callable[[], Finish]) -> Launched:
    """Give `work` to the device. Raises what `work` raises."""
    if device.type != "cuda":
        started = time.perf_counter()
        finish = work()
        return _Computed(time.perf_counter() - started, finish)
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True, blocking=True)  # waiting for it occupies no core
    begin.record()
    finish = work()
    end.record()
    return _OnStream(begin, end, finish)


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
