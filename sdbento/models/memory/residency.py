"""Bookkeeping of a device's memory: what is resident, what it costs, what may be evicted.

Counts what it is told; knows nothing of models, devices or threads. Its owner holds a lock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Entry(Generic[T]):
    nbytes: int
    item: T | None = None  # None: memory is reserved for it while it is being loaded
    locks: int = 0


class Residency(Generic[T]):
    """Items by key, in the order of their last use, the least recently used first.

    `capacity`: bytes that they may take together.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: dict[str, _Entry[T]] = {}

    @property
    def used(self) -> int:
        """Bytes of all items and reservations."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def available(self) -> int:
        """Negative where items turned out larger than what was reserved for them."""
        return self.capacity - self.used

    def has_all(self, keys: Iterable[str]) -> bool:
        return all(key in self._entries and self._entries[key].item is not None for key in keys)

    def nbytes(self, key: str) -> int:
        return self._entries[key].nbytes

    def entries(self) -> list[tuple[str, int, bool]]:
        """(key, bytes, locked) of every item."""
        return [
            (key, entry.nbytes, entry.locks > 0)
            for key, entry in self._entries.items()
            if entry.item is not None
        ]

    def items(self) -> dict[str, T]:
        """Every item by its key."""
        return {key: e.item for key, e in self._entries.items() if e.item is not None}

    def reserve(self, key: str, nbytes: int) -> None:
        """Count `nbytes` for an item that is about to be loaded: `add` or `cancel` follows."""
        self._entries[key] = _Entry(nbytes)

    def cancel(self, key: str) -> None:
        """Give a reservation up, unless its item has been added."""
        if not self.has_all([key]):
            self._entries.pop(key, None)

    def add(self, key: str, item: T, nbytes: int) -> None:
        """Make an item resident. It counts with its own size, even if that exceeds the capacity."""
        self._entries.setdefault(key, _Entry(nbytes)).item = item
        self._entries[key].nbytes = nbytes

    def grow(self, key: str, nbytes: int) -> None:
        """Count so many bytes more for an item, or less; nothing if it is not here any more."""
        if self.has_all([key]):
            self._entries[key].nbytes += nbytes

    def lock(self, keys: Sequence[str]) -> tuple[T, ...]:
        """The items of `keys`, which are not evicted until each lock has been undone."""
        for key in keys:
            self._entries[key].locks += 1
            self._mark_used(key)
        return tuple(item for key in keys if (item := self._entries[key].item) is not None)

    def unlock(self, keys: Sequence[str]) -> None:
        """Undo one `lock` of `keys`. This counts as a use: what was just used is not the oldest."""
        for key in keys:
            if self._entries[key].locks == 0:
                raise ValueError(f"{key} is not locked")
            self._entries[key].locks -= 1
            self._mark_used(key)

    def evictable(self, spare: Collection[str] = ()) -> list[str]:
        """Items that are neither locked nor in `spare`, the least recently used first."""
        return [
            key
            for key, entry in self._entries.items()
            if entry.item is not None and entry.locks == 0 and key not in spare
        ]

    def victims(self, nbytes: int, spare: Collection[str] = ()) -> list[str] | None:
        """The items to evict so that `nbytes` fit; empty where they fit already.

        None where they do not fit even if everything evictable is evicted.
        """
        missing = nbytes - self.available
        chosen: list[str] = []
        for key in self.evictable(spare):
            if missing <= 0:
                break
            chosen.append(key)
            missing -= self._entries[key].nbytes
        return chosen if missing <= 0 else None

    def evict(self, keys: Iterable[str]) -> list[T]:
        """Remove items, and return them."""
        removed = [self._entries.pop(key) for key in keys]
        return [entry.item for entry in removed if entry.item is not None]

    def clear(self) -> None:
        self._entries.clear()

    def _mark_used(self, key: str) -> None:
        self._entries[key] = self._entries.pop(key)
