"""When the requests under way will be done, for those who wait until one is.

Arithmetic on the seconds of work that are left; knows nothing of calls.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf, isinf

from sdbento.engine.handle import Handle
from sdbento.engine.trajectory import Owner, Trajectory


@dataclass(frozen=True)
class Ending:
    """When a request will be done (time.monotonic), whose it is, how many images it has, and the
    number of its handle."""

    at: float  # inf: nobody knows yet
    owner: Owner
    num_images: int
    request: int = 0


def forecast(
    handles: Iterable[Handle], work: Callable[[Trajectory], float], now: float
) -> list[Ending]:
    """The end of each request, the first one first; at its deadline it ends in any case.

    `work`: the seconds that an image still needs in full batches; inf where nobody knows.
    """
    in_order = sorted(handles, key=lambda handle: handle.submitted)
    firsts = [handle.trajectories[0] for handle in in_order]
    owners = [first.owner for first in firsts]
    seconds = [_work_of(handle, work) for handle in in_order]
    ends = ends_in_shares(list(zip(owners, seconds, strict=True)))
    endings = [
        Ending(_at(now + end, first.deadline), first.owner, len(handle.trajectories), handle.number)
        for handle, first, end in zip(in_order, firsts, ends, strict=True)
    ]
    return sorted(endings, key=lambda ending: ending.at)


def _at(end: float, deadline: float) -> float:
    return inf if isinf(end) else min(end, deadline)


def ends_in_shares(requests: Sequence[tuple[Owner, float]]) -> list[float]:
    """Seconds until each request is done, by its owner and its seconds of work.

    Owners have equal shares of the device, and the requests of each are done in this order: until
    an owner has had so many seconds, each of the others had as many, or all that he needs.
    """
    needed: defaultdict[Owner, float] = defaultdict(float)
    had = []
    for owner, seconds in requests:
        needed[owner] += seconds
        had.append(needed[owner])
    return [sum(min(seconds, all_his) for all_his in needed.values()) for seconds in had]


def _work_of(handle: Handle, work: Callable[[Trajectory], float]) -> float:
    """Images at the same step need the same, so that it is asked for one of them."""
    unfinished = [trajectory for trajectory in handle.trajectories if not trajectory.finished]
    alike = {(one.pass_index, one.step): one for one in unfinished}
    numbers = Counter((one.pass_index, one.step) for one in unfinished)
    return sum(numbers[step] * work(one) for step, one in alike.items())
