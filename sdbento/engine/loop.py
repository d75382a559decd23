"""The loop: plan, launch and record, once for each step, on the only thread that computes.

    submit -> inbox -> planner.plan -> runner.launch -> planner.advance
                            ^                                  |
                            +---- planner.record <- wait <-----+ -> handle

A plan needs no tensors, so the next step is launched shortly before the device has done the last
one, and the device never waits for this thread. Where launching is computing, on a CPU, its result
is read at once.

Requests reach the loop as commands in an inbox and are taken up between two steps; an idle engine
waits for the inbox, so that a request that arrives starts at once. The engine knows nothing of
HTTP, prompts, models or torch: it drives whatever `Runner` it was given, and whoever submits makes
sure that the trajectories' models stay resident until the handle is done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from queue import Empty, SimpleQueue
from statistics import median
from traceback import clear_frames
from typing import Protocol

from sdbento.catalog.families import VAE_FACTOR
from sdbento.engine.forecast import Ending, forecast
from sdbento.engine.handle import Calls, Estimated, Handle, Stepped
from sdbento.engine.planner import Planner
from sdbento.engine.trajectory import (
    Launched,
    Runner,
    Stage,
    StepPlan,
    StepResult,
    Trajectory,
)
from sdbento.engine.watchdog import Watchdog
from sdbento.errors import (
    Cancelled,
    DeadlineExceeded,
    OutOfMemory,
    SDBentoError,
    Unavailable,
    classify,
    stopping,
)
from sdbento.metrics.definitions import (
    active_images,
    decode_seconds,
    out_of_memory_total,
    rows_total,
    size_of,
    step_rows,
    step_seconds,
)

log = logging.getLogger(__name__)

ESTIMATES = 20.0  # times as long as it took to estimate a request's end, before the next one is
FORECAST = 1.0  # seconds between two forecasts of when requests end
AHEAD = 1  # plans that may be launched before the result of the one before is read
LAUNCHES = 16  # steps: their median tells how long it takes to launch one
MARGIN = 2.0  # medians before the device is idle, the next step is launched
LONG = 0.25  # seconds: a plan that is expected to take longer pauses for others
POLL = 0.005  # seconds between looks at a device that may be done earlier than expected
STALL = 60.0  # seconds after which a call hangs, at least
SLOW = 20.0  # times as long as expected: neither does a call hang that is merely slow
UNTIMED = 10.0  # times STALL: for a call whose kind was not timed yet, so that nothing is known
LAST_CALL = 60.0  # seconds that the end waits for a call under way, which may hang
REPLACED = 30.0  # seconds after which a new process may answer


@dataclass(frozen=True)
class _UnderWay:
    """A plan that was launched; its result has not been read."""

    plan: StepPlan
    launched: Launched
    steps_done: list[int]  # of each trajectory, after the plan
    is_part: bool  # of a plan that failed as a whole


class Observer(Protocol):
    """Somebody who looks at what the engine does. Called on the loop's thread, so it must be quick;
    one that raises is not called again."""

    def called(self, plan: StepPlan, steps_done: list[int], seconds: float) -> None:
        """A UNet call was made, after which the images of `plan` had so many steps done."""

    def changed(self) -> None:
        """A request has come or gone."""


class Engine:
    """Owns the loop thread and every unfinished request.

    `_lock` guards `_unfinished` and `_accepting`, nothing else; all other state belongs to the loop
    thread. `stall`: seconds after which a call to the runner hangs, if it was not expected to take
    long; `on_failure` is told when one does, or when the loop thread dies, and should `abandon`.
    """

    def __init__(
        self,
        runner: Runner,
        planner: Planner,
        *,
        stall: float = STALL,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._runner = runner
        self._planner = planner
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._idle_work: deque[Iterator[None]] = deque()
        self._lock = threading.Lock()
        self._accepting = True
        self._unfinished: set[Handle] = set()
        self._handles: dict[Trajectory, Handle] = {}
        self._under_way: deque[_UnderWay] = deque()
        self._busy_until = 0.0  # when the device is expected to have done all that is under way
        self._long: StepPlan | None = None  # being launched, and pauses
        self._resumed = 0.0  # when it began, or went on after its last pause
        self._later: list[Callable[[], None]] = []  # what must wait until no plan pauses
        self._launch_seconds = deque([0.0], maxlen=LAUNCHES)
        # When the requests under way will be done; replaced as a whole, for any thread to read.
        self.endings: list[Ending] = []
        self._forecast_due = self._estimate_due = 0.0  # monotonic seconds
        self.observer: Observer | None = None  # from any thread; None: nobody looks
        self._numbers = count(1)  # of requests
        self._running = True
        self._abandoned = False
        self._thread = threading.Thread(target=self._loop, name="sdbento-engine", daemon=True)
        self._stall = stall
        self._watchdog = Watchdog(self._thread, on_failure)

    def start(self) -> None:
        self._thread.start()
        self._watchdog.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._abandoned

    def check_usable(self) -> None:
        """Raises Unavailable once the engine was abandoned."""
        if self._abandoned:
            raise replaced()

    def submit(
        self,
        trajectories: list[Trajectory],
        deadline: float,
        about: object = None,
        number: int | None = None,
    ) -> Handle:
        """Take in the images of one request, to be done by `deadline` (time.monotonic).

        `about`: see Handle. `number`: the request's, where whoever submits numbers them. From any
        thread. Raises Unavailable when the engine is stopping.
        """
        if number is None:
            number = next(self._numbers)
        handle = Handle(trajectories, self._cancel, self._request_estimate, number, about)
        for trajectory in trajectories:
            trajectory.submitted = handle.submitted
            trajectory.deadline = deadline
            trajectory.num_images = len(trajectories)
        with self._lock:
            self.check_usable()
            if not self._accepting:
                raise stopping()
            self._unfinished.add(handle)
        self._inbox.put(lambda: self._admit(handle))
        return handle

    def call(self, function: Callable[[], None]) -> Future[None]:
        """Run `function` on the loop's thread between two steps, e.g. to compile a model."""
        done: Future[None] = Future()

        def run() -> None:
            if self._long is not None:
                self._later.append(run)
                return
            try:
                function()
            except BaseException as exc:
                done.set_exception(exc)
            else:
                done.set_result(None)

        self._inbox.put(run)
        return done

    def when_idle(self, work: Iterator[None]) -> None:
        """Advance `work` on the loop's thread while there is nothing else to do, so that a request
        waits for one `next` at most. Work that fails is given up. From any thread."""
        self._inbox.put(lambda: self._idle_work.append(work))

    def close(self, grace: float = 30.0) -> None:
        """Refuse new requests, finish the unfinished for up to `grace` seconds, stop the thread."""
        with self._lock:
            self._accepting = False
        give_up = time.monotonic() + grace
        while self._unfinished and self.alive and time.monotonic() < give_up:
            time.sleep(0.01)
        self._watchdog.stop()
        self._inbox.put(self._stop)
        if self.alive:
            self._thread.join(LAST_CALL)

    def give_up(self) -> None:
        """Refuse new requests, and fail the unfinished: the time for finishing them is over."""
        with self._lock:
            self._accepting = False
        self._inbox.put(lambda: self._fail_everyone(stopping()))

    def abandon(self) -> None:
        """Fail all unfinished requests, and take no more: only another process can go on.

        From any thread; waits for nothing, since the loop thread may hang for ever.
        """
        with self._lock:
            self._abandoned, self._accepting = True, False
            unfinished = list(self._unfinished)
            self._unfinished.clear()
        self._watchdog.stop()
        self._inbox.put(self._stop)
        for handle in unfinished:
            handle.done.set_exception(replaced())

    def _cancel(self, handle: Handle) -> None:
        if not handle.done.done():
            error = Cancelled("the request was cancelled")
            self._inbox.put(lambda: self._finish(handle, error))

    def _request_estimate(self, handle: Handle) -> None:
        """Tell a new listener where its request stands."""
        self._inbox.put(lambda: self._publish_estimate(handle))

    # From here on, everything runs on the loop thread.

    def requests(self) -> list[Handle]:
        """Those that are unfinished, in the order in which they were taken up."""
        return list(dict.fromkeys(self._handles.values()))

    def _loop(self) -> None:
        while self._running:
            try:
                self._iterate()
            except BaseException as exc:  # a bug; without this every request would hang
                log.exception("the engine's loop failed; all unfinished requests fail")
                self._fail_everyone(classify(exc))

    def _iterate(self) -> None:
        while self._later:
            self._later.pop(0)()
        self._take_commands_until_launch()
        if not self._running:
            return
        self._forecast()
        plan = self._planner.plan()
        if plan is not None:
            self._launch(plan)
            self._settle(AHEAD)
        elif self._under_way:
            self._settle(0)
        elif self._idle_work:
            self._advance_idle_work()
        else:
            self._take_commands(wait=None)

    def _take_commands_until_launch(self) -> None:
        """Take up commands for as long as the device has enough to do: whoever comes meanwhile can
        still join the next step."""
        self._take_commands(wait=0.0)
        while self._running and self._under_way and not self._under_way[-1].launched.done:
            left = self._busy_until - MARGIN * median(self._launch_seconds) - time.monotonic()
            if left <= 0:
                return
            self._take_commands(wait=min(left, POLL))

    def _launch(self, plan: StepPlan, *, is_part: bool = False) -> None:
        """Launch a plan; if that fails, its halves, and so on down to the trajectory at fault."""
        began = time.monotonic()
        try:
            with self._watched(plan):
                launched = self._call(plan)
        except BaseException as exc:  # those of libraries in Rust (PanicException) are no Exception
            if self._is_abandoned(plan):
                return
            error = self._note_failure(plan, exc)
        else:
            self._planner.advance(plan)
            steps_done = [trajectory.steps_done for trajectory in plan.trajectories]
            self._under_way.append(_UnderWay(plan, launched, steps_done, is_part))
            if plan.stage is Stage.STEP:
                self._launch_seconds.append(time.monotonic() - began)
            alone = len(self._under_way) == 1
            self._expect_until(began if alone else max(began, self._busy_until))
            return
        self._settle(0)  # what is under way may hold the memory that was lacking
        if len(plan.trajectories) == 1:
            self._record(plan, StepResult(0.0, {plan.trajectories[0]: error}), learn=False)
            return
        middle = len(plan.trajectories) // 2
        for half in (plan.trajectories[:middle], plan.trajectories[middle:]):
            unfinished = tuple(trajectory for trajectory in half if trajectory in self._handles)
            if unfinished:
                self._launch(StepPlan(plan.stage, plan.key, unfinished), is_part=True)

    def _watched(self, plan: StepPlan) -> AbstractContextManager[None]:
        """The runner works on `plan`, which hangs if that takes much longer than expected."""
        expected, timed = self._planner.experience(plan)
        limit = max(SLOW * expected, self._stall if timed else UNTIMED * self._stall)
        return self._watchdog.watching(f"{plan.stage} of {plan.key.model}", limit)

    def _call(self, plan: StepPlan) -> Launched:
        """Launch a plan; if it takes long where launching is computing, it pauses for others."""
        if self._long is not None or self._planner.expected_seconds(plan) < LONG:
            return self._runner.launch(plan)
        self._long, self._resumed = plan, time.monotonic()
        try:
            return self._runner.launch(plan, self._pause)
        finally:
            self._long = None

    def _pause(self) -> None:
        """In the midst of a long plan: launch what goes before the rest of it.

        Raises Cancelled, which ends the plan, when nobody waits for it any more.
        """
        plan = self._long
        assert plan is not None
        self._planner.pause(plan, time.monotonic() - self._resumed)
        self._take_commands(wait=0.0)
        while (between := self._planner.plan(within=plan)) is not None:
            self._launch(between)
            self._settle(0)
            self._take_commands(wait=0.0)
        if self._is_abandoned(plan):
            raise Cancelled("all requests of the plan have ended")
        self._resumed = time.monotonic()

    def _is_abandoned(self, plan: StepPlan) -> bool:
        return not any(trajectory in self._handles for trajectory in plan.trajectories)

    def _note_failure(self, plan: StepPlan, exc: BaseException) -> SDBentoError:
        """What went wrong when `plan` was launched."""
        error = classify(exc)
        if isinstance(error, OutOfMemory):
            out_of_memory_total.add()
            self._planner.shrink(plan)
        if len(plan.trajectories) == 1:
            log.warning("%s failed: %s", plan.stage, error.message, exc_info=exc)
        # The frames hold the failed call's tensors, and the next try would run out of memory.
        clear_frames(exc.__traceback__)
        return error

    def _expect_until(self, began: float) -> None:
        """Expect the plan that was launched last to take from `began` as long as others did."""
        self._busy_until = began + self._planner.expected_seconds(self._under_way[-1].plan)

    def _settle(self, most: int) -> None:
        """Read the results that are there, and those of all but `most` plans under way."""
        while self._under_way and (len(self._under_way) > most or self._under_way[0].launched.done):
            under_way = self._under_way.popleft()
            result = self._result(under_way)
            if self._under_way:
                self._expect_until(time.monotonic())
            self._record(under_way.plan, result, learn=not under_way.is_part)
            self._publish_steps(under_way)
            if self.observer is not None:
                self._tell_of_call(under_way, result.seconds)

    def _result(self, under_way: _UnderWay) -> StepResult:
        """Wait for a plan. If the device reports an error, all of its trajectories have failed."""
        try:
            with self._watched(under_way.plan):
                result = under_way.launched.wait()
        except BaseException as exc:
            error = classify(exc)
            log.warning("%s failed on the device: %s", under_way.plan.stage, error.message)
            return StepResult(0.0, dict.fromkeys(under_way.plan.trajectories, error))
        _count(under_way.plan, result.seconds)
        return result

    def _record(self, plan: StepPlan, result: StepResult, *, learn: bool) -> None:
        self._attribute(plan, result)
        ended = self._planner.record(plan, result, time.monotonic(), learn=learn)
        for trajectory in ended:
            self._end(trajectory)

    def _forecast(self) -> None:
        now = time.monotonic()
        if now < self._forecast_due:
            return
        self._forecast_due = now + FORECAST
        self.endings = forecast(set(self._handles.values()), self._planner.known_work, now)

    def _advance_idle_work(self) -> None:
        try:
            with self._watchdog.watching("work for idle time", UNTIMED * self._stall):
                next(self._idle_work[0])
        except StopIteration:
            self._idle_work.popleft()
        except BaseException as exc:
            self._idle_work.popleft()
            log.warning("work for idle time is given up: %s", classify(exc).message, exc_info=exc)

    def _take_commands(self, *, wait: float | None) -> None:
        """Run the commands in the inbox; wait up to `wait` seconds for one, None: for ever."""
        try:
            command = self._inbox.get(wait != 0, wait)
            while True:
                command()
                command = self._inbox.get_nowait()
        except Empty:
            return

    def _admit(self, handle: Handle) -> None:
        if handle not in self._unfinished:  # cancelled before the loop saw it
            return
        for trajectory in handle.trajectories:
            self._handles[trajectory] = handle
        active_images.set(len(self._handles))
        self._forecast_due = 0.0
        if (hopeless := self._hopeless(handle)) is not None:
            self._finish(handle, hopeless)
            return
        self._planner.add(handle.trajectories)
        self._tell_of_change()

    def _hopeless(self, handle: Handle) -> SDBentoError | None:
        """The error for a request whose deadline could not be met even on an idle machine."""
        first = handle.trajectories[0]
        needed = self._planner.lower_bound(first)
        left = first.deadline - time.monotonic()
        if needed <= left:
            return None
        return DeadlineExceeded(
            f"cannot be done within its timeout: needs at least {needed:.1f} s alone, "
            f"{max(0.0, left):.1f} s are left",
            param="timeout",
        )

    def _attribute(self, plan: StepPlan, result: StepResult) -> None:
        """Note on the handles that this was done for them."""
        now, seconds = time.monotonic(), result.seconds
        for handle in {self._handles[t] for t in plan.trajectories if t in self._handles}:
            if (calls := handle.calls.get(plan.stage)) is None:
                calls = handle.calls[plan.stage] = Calls(began=now - seconds, ended=now)
            calls.add(now, seconds, plan.size)

    def _publish_estimate(self, handle: Handle) -> None:
        if handle in self._unfinished:
            handle.emit(Estimated(eta=self._eta(handle)))

    def _eta(self, handle: Handle) -> float:
        """Seconds until the request is done, by its last estimate."""
        if not handle.estimated:
            self._estimate(handle)
        return max(0.0, handle.expected - time.monotonic())

    def _estimate(self, handle: Handle) -> None:
        """When the request will be done; what was launched is no part of the planner's."""
        handle.estimated = began = time.monotonic()
        under_way = max(0.0, self._busy_until - began) if self._under_way else 0.0
        handle.expected = began + under_way + self._planner.eta(handle.trajectories)
        self._estimate_due = began + ESTIMATES * (time.monotonic() - began)

    def _publish_steps(self, under_way: _UnderWay) -> None:
        plan = under_way.plan
        if plan.stage is not Stage.STEP:
            return
        self._refresh_estimates(plan)
        for trajectory, steps_done in zip(plan.trajectories, under_way.steps_done, strict=True):
            handle = self._handles.get(trajectory)
            preview, trajectory.preview = trajectory.preview, None
            if handle is not None and handle.has_listeners:
                handle.emit(
                    Stepped(
                        image=handle.trajectories.index(trajectory),
                        step=steps_done,
                        num_steps=trajectory.steps_in_all,
                        eta=self._eta(handle),
                        preview=preview,
                    )
                )

    def _refresh_estimates(self, plan: StepPlan) -> None:
        """Estimate anew when the requests of `plan` will be done, the oldest estimate first, for a
        small part of the time: it takes long where hundreds of images wait."""
        handles = {self._handles[t] for t in plan.trajectories if t in self._handles}
        for handle in sorted(handles, key=lambda handle: handle.estimated):
            if handle.has_listeners and time.monotonic() >= self._estimate_due:
                self._estimate(handle)

    def _end(self, trajectory: Trajectory) -> None:
        """A trajectory is finished: so is its request, if this one failed or was the last."""
        handle = self._handles.get(trajectory)
        if handle is None:  # a sibling's failure has ended the request already
            return
        if trajectory.error is not None or all(t.finished for t in handle.trajectories):
            self._finish(handle, trajectory.error)

    def _finish(self, handle: Handle, error: SDBentoError | None) -> None:
        """End a request, once, and free what it held."""
        with self._lock:
            if handle not in self._unfinished:
                return
            self._unfinished.remove(handle)
        self._forecast_due = 0.0
        self._planner.remove(handle.trajectories)
        for trajectory in handle.trajectories:
            self._handles.pop(trajectory, None)
            if self._long is not None and trajectory in self._long.trajectories:
                self._later.append(trajectory.release)
            else:
                trajectory.release()
        active_images.set(len(self._handles))
        if error is None:
            handle.done.set_result(None)
        else:
            handle.done.set_exception(error)
        self._tell_of_change()

    def _tell_of_call(self, under_way: _UnderWay, seconds: float) -> None:
        if under_way.plan.stage is Stage.STEP:
            plan, steps_done = under_way.plan, under_way.steps_done
            self._tell(lambda observer: observer.called(plan, steps_done, seconds))

    def _tell_of_change(self) -> None:
        if self.observer is not None:
            self._tell(lambda observer: observer.changed())

    def _tell(self, tell: Callable[[Observer], None]) -> None:
        observer = self.observer
        if observer is None:  # it has left this very moment
            return
        try:
            tell(observer)
        except Exception:
            log.exception("an observer of the engine failed, and is told no more")
            self.observer = None

    def _fail_everyone(self, error: SDBentoError) -> None:
        self._under_way.clear()
        for handle in list(self._unfinished):
            self._finish(handle, error)

    def _stop(self) -> None:
        self._running = False
        self._fail_everyone(stopping())


def _count(plan: StepPlan, seconds: float) -> None:
    """A plan was computed. This costs every step a few microseconds."""
    if plan.stage is Stage.STEP:
        pixels = plan.key.latent_pixels * VAE_FACTOR**2
        step_seconds.observe(seconds, plan.key.model, size_of(pixels))
        step_rows.observe(plan.rows)
        rows_total.add("useful", amount=plan.rows)
    elif plan.stage is Stage.DECODE:
        decode_seconds.observe(seconds)


def replaced() -> Unavailable:
    """The error for requests that come or wait once the engine was abandoned."""
    return Unavailable(
        "the device has failed, and the server is being restarted; send the request again",
        retry_after=REPLACED,
    )
