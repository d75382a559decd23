"""Which engine a request goes to: the one that is expected to be done with it first.

The work that an engine has left counts, and the loading of what it lacks. So a request goes to an
engine that has its model, and a model that many ask for spreads to another engine once waiting for
the first takes longer than loading it there. Arithmetic on numbers; knows nothing of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

EVICTION = 2.0  # times as long as a load: what makes room has to be loaded again


@dataclass(frozen=True)
class Need:
    """A model or ControlNet that a request needs, its bytes, and the seconds that a load takes."""

    key: str
    nbytes: int
    load_seconds: float


@dataclass(frozen=True)
class EngineLoad:
    """What an engine has to do.

    seconds: of work that is left, with those until it can begin at all. num_requests: how many it
    has. resident: keys in memory. coming: those that it loads already, and the seconds which that
    still takes. room: bytes that are free.
    """

    seconds: float = 0.0
    num_requests: int = 0
    resident: frozenset[str] = frozenset()
    coming: Mapping[str, float] = field(default_factory=dict)
    room: int = 0


def choose(loads: Sequence[EngineLoad], needs: Sequence[Need]) -> int:
    """The index of the engine for a request; where two are equal, the one with fewer requests."""
    costs = [(expected_wait(load, needs), load.num_requests) for load in loads]
    return costs.index(min(costs))


def expected_wait(load: EngineLoad, needs: Sequence[Need]) -> float:
    """Seconds until an engine has done what it has, and could begin with the request."""
    absent = missing(load, needs)
    loading = sum(need.load_seconds for need in absent)
    if sum(need.nbytes for need in absent) > load.room:
        loading *= EVICTION
    coming = max((load.coming[need.key] for need in needs if need.key in load.coming), default=0.0)
    return load.seconds + max(coming, 0.0) + loading


def missing(load: EngineLoad, needs: Sequence[Need]) -> list[Need]:
    """What an engine would have to load, and does not do so already."""
    return [need for need in needs if need.key not in load.resident and need.key not in load.coming]
