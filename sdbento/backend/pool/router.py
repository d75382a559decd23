"""The router: gives each request to one of several engine processes, and to another if that dies.

    begin -> router: choose an engine -> its process -> router -> the request's handle
                ^                             |
                +---- made again, once -------+ it dies, hangs, or its device has failed

All state belongs to the router's thread, which takes up commands from an inbox as the engine does.
An engine that dies ends no request: what it had is made again by another, with the same images,
since they follow from the request alone. Only a request that has lost two engines fails, as it may
be what they died of.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

import torch

from sdbento.access.caller import Caller, current_caller
from sdbento.backend.pool.devices import EngineDevice
from sdbento.backend.pool.estimates import Estimates
from sdbento.backend.pool.messages import (
    Begin,
    Cancel,
    Close,
    Failed,
    Finished,
    GiveUp,
    Happened,
    Listen,
    Loaded,
    Lost,
    Message,
    Observed,
    Preload,
    Preview,
    Report,
    Submitted,
)
from sdbento.backend.pool.observers import PoolObservation
from sdbento.backend.pool.remote import RemoteEngine
from sdbento.backend.pool.routed import RemoteHandle, RoutedRequest, units_of
from sdbento.backend.pool.routing import EngineLoad, choose, missing
from sdbento.backend.pool.slot import Slot
from sdbento.backend.protocol import ResidentSpec
from sdbento.catalog.specs import ModelSpec
from sdbento.engine.forecast import Ending
from sdbento.engine.handle import Handle
from sdbento.engine.loop import replaced
from sdbento.errors import (
    Cancelled,
    DeadlineExceeded,
    SDBentoError,
    Unavailable,
    classify,
    stopping,
)
from sdbento.live.batch import Device
from sdbento.live.snapshot import Snapshot
from sdbento.metrics.exposition import EXPOSITION
from sdbento.request.resolved import ResolvedRequest
from sdbento.request.result import Begun

log = logging.getLogger(__name__)

TICK = 0.25  # seconds between two looks at all engines
MAX_LOST = 2  # engines that a request may lose
HOPELESS = 5  # starts in a row that have failed, of every engine: another process may do better
LATE = 30.0  # seconds beyond its deadline in which an engine ends a request
RESTART = 10.0  # seconds in which an engine has started anew
LAST_CALL = 10.0  # seconds beyond its grace in which an engine process ends


class EnginePool:
    """A Backend. `on_broken` is called, with the reason, when no engine can be started any more."""

    def __init__(
        self,
        devices: Sequence[EngineDevice],
        stall: float,
        on_broken: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._slots = [Slot(index, device) for index, device in enumerate(devices)]
        self._stall = stall
        self._on_broken = on_broken
        self._estimates = Estimates(devices[0].settings)
        self._inbox = SimpleQueue[Callable[[], None]]()
        self._numbers = count(1)  # of requests
        self._waiting: list[RoutedRequest] = []  # for an engine to start
        self._observation: PoolObservation | None = None
        self._is_refusing = False
        self._running = True
        self._thread = threading.Thread(target=self._run, name="sdbento-router", daemon=True)
        self._next_look = 0.0
        # Replaced as a whole, for any thread to read.
        self.endings: list[Ending] = []
        self._residents: list[ResidentSpec] = []

    def start(self) -> None:
        torch.set_num_threads(1)  # the cores are for the engines
        self._thread.start()

    @property
    def alive(self) -> bool:
        return any(slot.is_alive for slot in self._slots)

    @property
    def ready(self) -> bool:
        reports = [slot.report for slot in self._slots]
        return any(report.is_ready for report in reports if report is not None)

    def check_usable(self) -> None:
        if not self.alive:
            raise Unavailable(
                "all devices have failed, and are being started anew; send the request again",
                retry_after=RESTART,
            )

    def residents(self) -> list[ResidentSpec]:
        return self._residents

    def devices(self) -> list[Device]:
        return [Device(slot.index, slot.device.name, slot.is_up) for slot in self._slots]

    def notice(self, error: Exception) -> None:
        """Engine processes notice for themselves."""

    async def begin(self, request: ResolvedRequest) -> Begun:
        if self._is_refusing:
            raise stopping()
        number = next(self._numbers)
        handle = RemoteHandle(number, self._cancel, self._listen, self._preview_every(number))
        routed = RoutedRequest(
            request.without_sources(),
            current_caller(),
            handle,
            self._estimates.needs(request.specs),
            units_of(request),
        )
        self._inbox.put(lambda: self._take_in(routed))
        try:
            return await asyncio.wrap_future(routed.begun)
        except asyncio.CancelledError:
            handle.cancel()
            raise

    def preload(self, spec: ModelSpec) -> Future[Any]:
        loading, number, caller = Future[Any](), next(self._numbers), current_caller()
        self._inbox.put(lambda: self._preload(spec, loading, number, caller))
        loading.add_done_callback(lambda _: self._inbox.put(lambda: self._drop_preload(number)))
        return loading

    def observe(
        self, publish: Callable[[Snapshot], None], on_failure: Callable[[], None]
    ) -> Callable[[], None]:
        observation = PoolObservation(self._slots, publish, on_failure)

        def begin() -> None:
            self._observation = observation
            observation.begin()

        def end() -> None:
            observation.end()
            if self._observation is observation:
                self._observation = None

        self._inbox.put(begin)

        def silence() -> None:
            observation.silence()
            self._inbox.put(end)

        return silence

    def give_up(self) -> None:
        self._is_refusing = True
        self._inbox.put(self._give_up)

    def close(self, grace: float) -> None:
        self._is_refusing = True
        if not self._thread.is_alive():
            return
        closing = Future[list[RemoteEngine]]()
        self._inbox.put(lambda: closing.set_result(self._begin_to_close(grace)))
        deadline = time.monotonic() + grace + LAST_CALL
        for engine in closing.result():
            if not engine.wait(max(0.0, deadline - time.monotonic())):
                engine.kill()
        self._inbox.put(self._stop)

    def _cancel(self, handle: Handle) -> None:
        if not handle.done.done():
            error = Cancelled("the request was cancelled")
            self._inbox.put(lambda: self._end(handle.number, error))

    def _listen(self, handle: Handle) -> None:
        self._inbox.put(lambda: self._tell_engine(handle.number, Listen(handle.number)))

    def _preview_every(self, number: int) -> Callable[[int], None]:
        def preview(num_steps: int) -> None:
            self._inbox.put(lambda: self._change_previews(number, num_steps))

        return preview

    # From here on, everything runs on the router's thread.

    def _run(self) -> None:
        while self._running:
            try:
                self._take_command()
                if time.monotonic() >= self._next_look:
                    self._next_look = time.monotonic() + TICK
                    self._look()
            except Exception:  # a bug; without this every request would hang
                log.exception("the router failed at a command, which is left out")

    def _take_command(self) -> None:
        with suppress(Empty):
            self._inbox.get(timeout=self._pause)()
        if self._observation is not None:
            self._observation.publish_if_due()

    @property
    def _pause(self) -> float:
        """Seconds in which nothing is due but commands."""
        left = max(0.0, self._next_look - time.monotonic())
        return left if self._observation is None else min(left, self._observation.seconds_left)

    def _look(self) -> None:
        """Start engines that are due, notice those that hang, and requests that are late."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.engine is None and now >= slot.start_at and not self._is_refusing:
                self._start(slot)
            elif slot.hangs(TICK, self._stall):
                self._lose(slot, "it does not answer")
        self._end_late(now)
        self._place_waiting()

    def _end_late(self, now: float) -> None:
        """Engines end late requests themselves, between two steps; one that is frozen does not."""
        placed = [one for slot in self._slots for one in slot.requests.values()]
        late = [one for one in self._waiting if one.request.deadline < now]
        late += [one for one in placed if one.request.deadline + LATE < now]
        for routed in late:
            what = "no device was done with it within the request's timeout"
            self._end(routed.number, DeadlineExceeded(what, param="timeout"))

    def _start(self, slot: Slot) -> None:
        try:
            engine = RemoteEngine(
                slot.device,
                lambda engine, message: self._inbox.put(lambda: self._take(engine, message)),
                lambda engine: self._inbox.put(lambda: self._notice_end(engine)),
            )
        except OSError as error:
            log.error("no process can be started for %s: %s", slot.device.name, error)
            slot.fail()
            return
        slot.begin(engine)
        log.info("%s: engine process %d is starting", slot.device.name, engine.pid)

    def _take_in(self, routed: RoutedRequest) -> None:
        try:
            self._place(routed)
        except Exception as error:  # a bug; else whoever waits for it would wait for ever
            routed.fail(classify(error))
            raise

    def _place(self, routed: RoutedRequest) -> None:
        """Give a request to an engine, or let it wait until one is being started.

        One that has lost an engine waits for one that has been heard since: what ended the first
        may be ending others, which has not been noticed yet.
        """
        slots = [slot for slot in self._slots if slot.heard >= routed.lost]
        if not slots or self._is_refusing:
            self._waiting.append(routed)
            return
        loads = [self._load_of(slot) for slot in slots]
        chosen = choose(loads, routed.needs)
        slot, engine = slots[chosen], slots[chosen].engine
        assert engine is not None
        routed.place(slot, [need.key for need in missing(loads[chosen], routed.needs)])
        slot.requests[routed.number] = routed
        engine.send(Begin(routed.number, routed.request, routed.caller))
        log.debug("request %d goes to %s", routed.number, slot.device.name)

    def _load_of(self, slot: Slot) -> EngineLoad:
        requests = list(slot.requests.values())
        return self._estimates.load_of(slot.report, requests, time.monotonic(), slot.delay)

    def _place_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for routed in waiting:
            self._place(routed)

    def _find(self, number: int) -> RoutedRequest | None:
        for slot in self._slots:
            if number in slot.requests:
                return slot.requests[number]
        return next((one for one in self._waiting if one.number == number), None)

    def _end(self, number: int, error: SDBentoError) -> None:
        """Whoever waits for a request is told so, and its engine stops making it."""
        if (routed := self._find(number)) is None:
            return
        self._tell_engine(number, Cancel(number))
        self._forget(routed)
        routed.fail(error)

    def _forget(self, routed: RoutedRequest) -> None:
        if routed.slot is not None:
            routed.slot.requests.pop(routed.number, None)
        if routed in self._waiting:
            self._waiting.remove(routed)

    def _tell_engine(self, number: int, message: Message) -> None:
        for slot in self._slots:
            if slot.engine is not None and (number in slot.requests or number in slot.preloads):
                slot.engine.send(message)

    def _change_previews(self, number: int, num_steps: int) -> None:
        if (routed := self._find(number)) is not None:
            routed.preview_every = num_steps
            self._tell_engine(number, Preview(number, num_steps))

    def _preload(self, spec: ModelSpec, loading: Future[Any], number: int, caller: Caller) -> None:
        slots = [slot for slot in self._slots if slot.engine is not None]
        if not slots:
            loading.cancel()
            return
        needs = self._estimates.needs([spec])
        slot = slots[choose([self._load_of(slot) for slot in slots], needs)]
        slot.preloads[number] = loading
        self._tell_engine(number, Preload(number, spec, caller))

    def _drop_preload(self, number: int) -> None:
        self._tell_engine(number, Cancel(number))
        for slot in self._slots:
            slot.preloads.pop(number, None)

    def _take(self, engine: RemoteEngine, message: Message) -> None:
        """What an engine process says; nothing that one says which was given up meanwhile."""
        slot = next((slot for slot in self._slots if slot.engine is engine), None)
        if slot is None:
            return
        match message:
            case Report():
                self._take_report(slot, engine, message)
            case Lost(reason):
                self._lose(slot, reason)
            case Observed(snapshot):
                if self._observation is not None:
                    self._observation.take(slot, snapshot)
            case Loaded(number):
                loading = slot.preloads.pop(number, None)
                if loading is not None and loading.set_running_or_notify_cancel():
                    loading.set_result(None)
            case Submitted() | Happened() | Finished() | Failed():
                if (routed := slot.requests.get(message.number)) is not None:
                    self._advance(routed, message)

    def _advance(
        self, routed: RoutedRequest, message: Submitted | Happened | Finished | Failed
    ) -> None:
        match message:
            case Submitted(number, own_sampler, warnings, at):
                self._estimates.learn_load(routed, time.monotonic())
                if routed.preview_every is not None:
                    self._tell_engine(number, Preview(number, routed.preview_every))
                routed.begin(own_sampler, warnings, at)
                if routed.handle.has_listeners:
                    self._tell_engine(number, Listen(number))
            case Happened(_, event):
                routed.handle.emit(event)
            case Finished(_, images, calls):
                self._forget(routed)
                routed.handle.finish(images, calls)
            case Failed(_, error, calls):
                self._forget(routed)
                routed.handle.calls = calls
                routed.fail(error)

    def _take_report(self, slot: Slot, engine: RemoteEngine, report: Report) -> None:
        was_up, engine.report = slot.is_up, report
        EXPOSITION.absorb(slot.device.name, report.counted)
        for number, calls in report.calls.items():
            if number in slot.requests:  # it may have been cancelled meanwhile
                slot.requests[number].handle.calls = calls
        self._estimates.learn_work(report, list(slot.requests.values()), time.monotonic())
        self._gather()
        if not was_up:
            log.info("%s: the engine has started", slot.device.name)
            if self._observation is not None:
                self._observation.begin_with(slot)

    def _gather(self) -> None:
        """What all engines report, for those who ask."""
        reports = [(slot, slot.report) for slot in self._slots if slot.report is not None]
        endings = [
            ending
            for slot, report in reports
            for ending in report.endings
            if ending.request in slot.requests
        ]
        self.endings = sorted(endings, key=lambda ending: ending.at)
        self._residents = [
            replace(resident, device=slot.index)
            for slot, report in reports
            for resident in report.residents
        ]

    def _notice_end(self, engine: RemoteEngine) -> None:
        for slot in self._slots:
            if slot.engine is engine:
                self._lose(slot, "its process has ended")

    def _lose(self, slot: Slot, reason: str) -> None:
        """An engine is gone, or is to go: others make what it had, and a new one is started."""
        engine, requests = slot.engine, list(slot.requests.values())
        assert engine is not None
        slot.fail()
        slot.requests.clear()
        engine.kill()
        EXPOSITION.end(slot.device.name)
        if self._is_refusing:
            for routed in requests:
                routed.fail(stopping())
            return
        log.error(
            "%s has lost its engine: %s. It is started anew, and its %d requests are made again",
            *(slot.device.name, reason, len(requests)),
        )
        for loading in slot.preloads.values():
            loading.cancel()
        slot.preloads.clear()
        if self._observation is not None:
            self._observation.drop(slot)
        self._gather()
        self._make_again(requests)
        if all(not slot.is_up and slot.num_failures >= HOPELESS for slot in self._slots):
            self._on_broken("no device can be used any more")
            self._fail_all(replaced)

    def _make_again(self, requests: Sequence[RoutedRequest]) -> None:
        for routed in requests:
            routed.lose()
            if routed.num_lost < MAX_LOST:
                self._place(routed)
            else:
                what = "two devices failed while they made this request; it was not tried again"
                routed.fail(Unavailable(what, retry_after=RESTART))

    def _give_up(self) -> None:
        for slot in self._slots:
            if slot.engine is not None:
                slot.engine.send(GiveUp())
        self._fail_all(stopping)

    def _fail_all(self, error: Callable[[], SDBentoError]) -> None:
        for slot in self._slots:
            for routed in slot.requests.values():
                routed.fail(error())
            slot.requests.clear()
        self._fail_waiting(error)

    def _fail_waiting(self, error: Callable[[], SDBentoError]) -> None:
        for routed in self._waiting:
            routed.fail(error())
        self._waiting.clear()

    def _begin_to_close(self, grace: float) -> list[RemoteEngine]:
        self._fail_waiting(stopping)
        engines = []
        for slot in self._slots:
            if slot.engine is None:
                continue
            if slot.is_up:
                slot.engine.send(Close(grace))
                engines.append(slot.engine)
            else:  # it would not read it before it has started
                self._lose(slot, "")
        return engines

    def _stop(self) -> None:
        """All engine processes are gone."""
        self._running = False
        for slot in self._slots:
            for routed in slot.requests.values():
                routed.fail(stopping())
