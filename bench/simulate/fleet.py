"""Many workers behind an autoscaler that counts requests, as RunPod's does.

- Requests wait in one queue. A worker takes one whenever it holds fewer than `together`; of several
  that could, the one with the fewest does.
- Every second the scaler wants one worker for each `together` unfinished requests, `most` at most.
  Workers that are missing are started, and take requests COLD_START later.
- A worker that has had nothing to do for IDLE seconds ends, unless the scaler wants it.
- A worker costs from its start to its end, the cold start included.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from math import ceil

from bench.simulate.clock import Clock
from bench.simulate.curves import Curves
from bench.simulate.device import Device, MakePolicy, Outcome
from bench.simulate.policies import Packing, Policy
from bench.simulate.traces import Request

COLD_START = 12.0
IDLE = 5.0
LOOK_EVERY = 1.0


@dataclass
class FleetOutcome:
    """`outcome` of all requests; the workers that there were at once, and the seconds they cost."""

    outcome: Outcome
    most_workers: int
    worker_seconds: float


class Worker:
    """A device that came after its cold start."""

    def __init__(self, clock: Clock, policy: Policy, fleet: Fleet) -> None:
        self.policy = policy
        self.device = Device(clock, policy, self._done)
        self.held = 0
        self.idle_since = clock()
        self.born = clock() - COLD_START
        self._clock = clock
        self._fleet = fleet

    def take(self, request: Request) -> None:
        self.held += 1
        self.device.submit(request)

    def _done(self, request: Request) -> None:
        self.held -= 1
        self.idle_since = self._clock()
        self._fleet.done(request)


class Fleet:
    """The queue, its workers and their scaler."""

    def __init__(self, curves: Curves, make: MakePolicy, together: int, most: int) -> None:
        self.clock = Clock()
        self._new_policy = partial(make, curves, self.clock)
        self._together = together
        self._most = most
        self._waiting: deque[Request] = deque()
        self._workers: list[Worker] = []
        self._num_starting = 0
        self._expected = 0  # requests that are not done, whether they have arrived or not
        self._unfinished = 0
        self._latencies: list[float] = []
        self._packing = Packing()
        self._worker_seconds = 0.0
        self._most_workers = 0

    def run(self, trace: list[Request]) -> FleetOutcome:
        self._expected = len(trace)
        for request in trace:
            self.clock.at(request.at, partial(self._arrive, request))
        self._scale()
        self.clock.run()
        for worker in self._workers:
            self._end(worker)
        outcome = Outcome(self._latencies, self.clock(), self._packing)
        return FleetOutcome(outcome, self._most_workers, self._worker_seconds)

    def done(self, request: Request) -> None:
        self._latencies.append(self.clock() - request.at)
        self._expected -= 1
        self._unfinished -= 1
        self._hand_out()

    def _arrive(self, request: Request) -> None:
        self._unfinished += 1
        self._waiting.append(request)
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._workers:
            worker = min(self._workers, key=lambda worker: worker.held)
            if worker.held >= self._together:
                return
            worker.take(self._waiting.popleft())

    def _scale(self) -> None:
        wanted = min(self._most, ceil(self._unfinished / self._together))
        missing = wanted - len(self._workers) - self._num_starting
        for _ in range(missing):
            self._num_starting += 1
            self.clock.after(COLD_START, self._begin)
        overdue = [w for w in self._workers if not w.held and self._idle(w) >= IDLE]
        for worker in overdue[: max(0, -missing)]:
            self._workers.remove(worker)
            self._end(worker)
        self._most_workers = max(self._most_workers, len(self._workers) + self._num_starting)
        if self._expected:
            self.clock.after(LOOK_EVERY, self._scale)

    def _idle(self, worker: Worker) -> float:
        return self.clock() - worker.idle_since

    def _begin(self) -> None:
        self._num_starting -= 1
        self._workers.append(Worker(self.clock, self._new_policy(), self))
        self._hand_out()

    def _end(self, worker: Worker) -> None:
        self._worker_seconds += self.clock() - worker.born
        self._packing.seconds += worker.policy.packing.seconds
        self._packing.best += worker.policy.packing.best
