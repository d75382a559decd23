"""Records what the engine does while somebody watches, on the engine's thread.

A snapshot is made after a UNet call or a change of the queue, at most ten times a second, so that
quick calls are not slowed down; who took part in each of the calls between is not kept. Knows
nothing of watchers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from sdbento.engine.loop import Engine
from sdbento.engine.trajectory import BatchKey, StepPlan
from sdbento.live.batch import Batch, Recent
from sdbento.live.snapshot import (
    Call,
    Members,
    Snapshot,
    lane_of,
    lanes_of,
    left_since,
    members_of,
    queue_of,
    requests_of,
)

INTERVAL = 0.1  # seconds between two snapshots, at least
HEARTBEAT = 1.0  # seconds after which there is one although nothing has happened
RECENT_CALLS = 64  # "of late" means so many calls
RECENT_SECONDS = 10.0  # and those of so many seconds


@dataclass(frozen=True)
class _Figures:
    """What is remembered of a UNet call for longer than until the next; holds no images."""

    at: float
    rows: int
    images: int
    seconds: float


class Recorder:
    """Observes `engine`, and gives `publish` each snapshot.

    Everything is called on the engine's thread, but `is_due` by any. `publish` is called there as
    well, and must return at once.
    """

    def __init__(self, engine: Engine, publish: Callable[[Snapshot], None]) -> None:
        self._engine = engine
        self._publish = publish
        self._stale = True  # something has changed since the last snapshot, which was made at
        self._recorded = 0.0
        self._num_snapshots = self._num_calls = 0
        self._recent: deque[_Figures] = deque(maxlen=RECENT_CALLS)
        self._calls: dict[BatchKey, Call] = {}  # the last of each lane
        self._current: BatchKey | None = None  # the lane of the last call of all
        self._members: Members = {}  # in the last snapshot

    def called(self, plan: StepPlan, steps_done: list[int], seconds: float) -> None:
        """A UNet call is done, after which its images had so many steps done."""
        done = dict(zip(plan.trajectories, steps_done, strict=True))
        self._num_calls += 1
        self._recent.append(_Figures(time.monotonic(), plan.rows, len(done), seconds))
        self._current = lane_of(plan.key)
        self._calls[self._current] = Call(plan.rows, seconds, done)
        self.changed()

    def changed(self) -> None:
        """Something has come or gone."""
        self._stale = True
        self.refresh()

    @property
    def is_due(self) -> bool:
        """Whether it is time for another snapshot."""
        age = time.monotonic() - self._recorded
        return age >= (INTERVAL if self._stale else HEARTBEAT)

    def refresh(self) -> None:
        """Make a snapshot if it is time for one."""
        if self.is_due:
            self._record(time.monotonic())

    def _record(self, now: float) -> None:
        self._recorded, self._stale = now, False
        self._num_snapshots += 1
        handles = self._engine.requests()
        ends = {ending.request: ending.at - now for ending in self._engine.endings}
        lanes = lanes_of(handles, self._calls, self._current, self._members)
        before, self._members = self._members, members_of(handles, self._calls)
        batch = Batch(
            number=self._num_snapshots,
            time=round(time.time(), 3),
            calls=self._num_calls,
            recent=self._means(now),
            queue=queue_of(handles, ends),
            lanes=lanes,
            requests=tuple(requests_of(handles, ends, now)),
            left=tuple(left_since(before, self._members)),
            models=(),
        )
        # Keys have no end, and calls hold images: those of lanes without any are forgotten.
        lived = {lane_of(one.key) for handle in handles for one in handle.trajectories}
        self._calls = {key: call for key, call in self._calls.items() if key in lived}
        owners = {handle.number: handle.trajectories[0].owner for handle in handles}
        self._publish(Snapshot(batch, owners))

    def _means(self, now: float) -> Recent | None:
        recent = [one for one in self._recent if now - one.at <= RECENT_SECONDS]
        if not recent:
            return None
        return Recent(
            calls=len(recent),
            rows=round(fmean(one.rows for one in recent), 2),
            images=round(fmean(one.images for one in recent), 2),
            seconds=round(fmean(one.seconds for one in recent), 5),
        )
