"""One device under load: requests that arrive by themselves, or clients that wait for answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import quantiles

from bench.simulate.clock import Clock
from bench.simulate.curves import Curves
from bench.simulate.policies import OneAtATime, Packing, Policy
from bench.simulate.traces import Request

MakePolicy = Callable[[Curves, Clock], Policy]


@dataclass
class Outcome:
    """Seconds from each request's arrival to its image, and until the last image."""

    latencies: list[float]
    seconds: float
    packing: Packing

    @property
    def throughput(self) -> float:
        return len(self.latencies) / self.seconds

    @property
    def worst(self) -> float:
        return max(self.latencies)

    def percentile(self, percent: int) -> float:
        if len(self.latencies) == 1:
            return self.latencies[0]
        return quantiles(self.latencies, n=100, method="inclusive")[percent - 1]


class Device:
    """Works whenever its policy has something to do; tells `done` of every image."""

    def __init__(self, clock: Clock, policy: Policy, done: Callable[[Request], None]) -> None:
        self.busy = False
        self._clock = clock
        self._policy = policy
        self._done = done

    def submit(self, request: Request) -> None:
        self._policy.add(request)
        if not self.busy:
            self._begin()

    def _begin(self) -> None:
        seconds = self._policy.begin()
        self.busy = seconds is not None
        if seconds is not None:
            self._clock.after(seconds, self._end)

    def _end(self) -> None:
        for request in self._policy.end():
            self._done(request)
        self._begin()


def open_loop(curves: Curves, make: MakePolicy, trace: list[Request]) -> Outcome:
    """Requests arrive when the trace says, whether or not the device keeps up."""
    load = Load(curves, make)
    for request in trace:
        load.clock.at(request.at, partial(load.device.submit, request))
    return load.run()


def closed_loop(curves: Curves, make: MakePolicy, requests: list[Request], clients: int) -> Outcome:
    """Each client sends its next request when it has the image of its last."""
    waiting = iter(requests)

    def send(_: Request | None = None) -> None:
        request = next(waiting, None)
        if request is not None:
            load.device.submit(replace(request, at=load.clock()))

    load = Load(curves, make, answered=send)
    for _ in range(clients):
        send()
    return load.run()


class Load:
    """A device, and the latencies of what it was sent."""

    def __init__(
        self,
        curves: Curves,
        make: MakePolicy,
        answered: Callable[[Request], None] = lambda _: None,
    ) -> None:
        self.clock = Clock()
        self._policy = make(curves, self.clock)
        self.device = Device(self.clock, self._policy, self._done)
        self._answered = answered
        self._latencies: list[float] = []
        self._last = 0.0  # when the last image was done

    def run(self) -> Outcome:
        self.clock.run()
        return Outcome(self._latencies, self._last, self._policy.packing)

    def _done(self, request: Request) -> None:
        self._last = self.clock()
        self._latencies.append(self._last - request.at)
        self._answered(request)


def capacity(curves: Curves, requests: list[Request]) -> float:
    """Requests a second that one at a time can do."""
    return closed_loop(curves, OneAtATime, requests, clients=1).throughput
