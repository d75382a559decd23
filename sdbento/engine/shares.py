"""Equal shares of the device for everybody who has images waiting, however many they are.

Start-time fair queueing (Goyal, Vin and Cheng 1996), where many may share a call. Each owner of
images has a clock, which advances by the seconds that the device works for it; whoever is furthest
behind goes first. Virtual time is the least of these clocks. An owner who comes, or comes back,
starts there at the earliest, so that nobody is paid for having been idle.

Knows nothing of who the owners are, nor of calls but their seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from sdbento.engine.trajectory import Owner, StepPlan, Trajectory


class Shares:
    """The clocks of all owners. Used on the engine's thread only."""

    def __init__(self) -> None:
        self._clocks: dict[Owner, float] = {}
        self._time = 0.0  # virtual
        self._num_waiting: Counter[Owner] = Counter()

    def update(self, waiting: Sequence[Trajectory]) -> None:
        """Take note of all that wait for the next call; when nothing does, everything is forgotten.

        Of owners who have left, only clocks that are ahead of virtual time are kept.
        """
        self._num_waiting = Counter(trajectory.owner for trajectory in waiting)
        if not waiting:
            self._clocks, self._time = {}, 0.0
            return
        clocks = {owner: self._clock(owner) for owner in self._num_waiting}
        self._time = min(clocks.values())
        ahead = {owner: clock for owner, clock in self._clocks.items() if clock > self._time}
        self._clocks = ahead | clocks

    def order(
        self, queue: list[Trajectory], seconds: Callable[[Trajectory], float]
    ) -> list[Trajectory]:
        """Spread the images of each owner; among themselves they keep the order of `queue`.

        The place of each is the clock that its owner will have once all of the owner's images
        before it have had a call, of so many `seconds`.
        """
        if len(self._num_waiting) == 1:
            return queue
        clocks = {owner: self._clock(owner) for owner in self._num_waiting}
        places: list[float] = []
        for trajectory in queue:
            places.append(clocks[trajectory.owner])
            clocks[trajectory.owner] += seconds(trajectory)
        return [queue[i] for i in sorted(range(len(queue)), key=places.__getitem__)]

    def charge(self, plan: StepPlan, seconds: float) -> None:
        """A call of so many seconds was launched: clocks advance by the rows that each owner has.

        An owner all of whose images take part could not use more. Whatever others get beyond it is
        no debt to it: afterwards it is no further behind than those who have still more images.
        """
        num_images = Counter(trajectory.owner for trajectory in plan.trajectories)
        for trajectory in plan.trajectories:
            clock = self._clock(trajectory.owner) + seconds * trajectory.rows / plan.rows
            self._clocks[trajectory.owner] = clock
        more = [self._clocks[o] for o, num in num_images.items() if num < self._num_waiting[o]]
        least = min(more, default=self._time)
        for owner in num_images:
            self._clocks[owner] = max(self._clocks[owner], least)

    def seconds_for_others(
        self, owner: Owner, seconds: float, work: Mapping[Owner, float]
    ) -> float:
        """Seconds that the device works for others until it has worked for `owner` so many more.

        `work`: how many seconds each of the others needs at most.
        """
        until = self._clock(owner) + seconds
        return sum(
            min(needed, max(0.0, until - self._clock(other))) for other, needed in work.items()
        )

    def _clock(self, owner: Owner) -> float:
        return self._clocks.get(owner, self._time)
