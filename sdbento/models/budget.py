"""Memory accounting: how many bytes models hold of a device, and which of them would make room.

Counts what it is told; knows nothing of models, devices or threads. Its owner holds a lock.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass
class _Holding:
    nbytes: int
    pins: int = 0


class Budget:
    """Bytes held by name. Names are kept in the order of their last use, the oldest first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._holdings: dict[str, _Holding] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._holdings

    @property
    def used(self) -> int:
        return sum(holding.nbytes for holding in self._holdings.values())

    @property
    def available(self) -> int:
        return self.capacity - self.used

    def nbytes(self, name: str) -> int:
        return self._holdings[name].nbytes

    def pinned(self, name: str) -> bool:
        return self._holdings[name].pins > 0

    def names(self) -> list[str]:
        """The least recently used first."""
        return list(self._holdings)

    def reserve(self, name: str, nbytes: int) -> None:
        """Count `nbytes` as held by `name`; what it was before is replaced.

        May exceed the capacity: a model that turns out larger than announced is there all the same.
        """
        if name in self._holdings:
            self._holdings[name].nbytes = nbytes
        else:
            self._holdings[name] = _Holding(nbytes)

    def release(self, name: str) -> int:
        """Count `name` no more; returns the bytes it held."""
        return self._holdings.pop(name).nbytes

    def pin(self, name: str) -> None:
        """Bar `name` from eviction, once more, and count this as a use."""
        self._holdings[name].pins += 1
        self._use(name)

    def unpin(self, name: str) -> None:
        """Take back one `pin`. The end of a use is a use: what just finished is not the oldest."""
        if self._holdings[name].pins == 0:
            raise ValueError(f"{name} is not pinned")
        self._holdings[name].pins -= 1
        self._use(name)

    def victims(self, nbytes: int, spare: Collection[str] = ()) -> list[str] | None:
        """Whom to release, the least recently used first, so that `nbytes` fit.

        Empty where they fit already; None where what is neither pinned nor to be spared does not
        suffice.
        """
        missing = nbytes - self.available
        chosen: list[str] = []
        for name, holding in self._holdings.items():
            if missing <= 0:
                break
            if holding.pins == 0 and name not in spare:
                chosen.append(name)
                missing -= holding.nbytes
        return chosen if missing <= 0 else None

    def _use(self, name: str) -> None:
        self._holdings[name] = self._holdings.pop(name)
