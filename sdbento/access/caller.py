"""On whose behalf the present task works. Doors say so, App and the jobs ask.

A context variable and no parameter, so that no door can forget to pass it on: tasks and
`asyncio.to_thread` inherit it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Allowance:
    """What a key allows; None: as much as the server does."""

    requests_per_minute: int | None = None
    images_at_once: int | None = None
    models: frozenset[str] | None = None


@dataclass(frozen=True)
class Caller:
    """Whoever sends requests with one key; `name` is the key's. None: the server has no keys.

    `name` decides who may see and change what. `shares`: whether others have keys as well, so that
    a part of every queue is left to them. `address`: where requests without a key come from, which
    is all that tells their clients apart; None: not from a network.
    """

    name: str | None = None
    allowance: Allowance = Allowance()
    shares: bool = False
    address: str | None = None

    @property
    def owner(self) -> str | None:
        """For whom shares are counted and turns are taken: the key, or the address without one."""
        return self.address if self.name is None else self.name


ANYBODY = Caller()

_current: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)


def current_caller() -> Caller:
    return _current.get()


@contextmanager
def acting_for(caller: Caller) -> Iterator[None]:
    """Work on behalf of `caller`."""
    token = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(token)
