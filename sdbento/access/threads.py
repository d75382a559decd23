"""Threads for slow calls, such as to other hosts, of which each caller has a share only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

from sdbento.access.caller import current_caller
from sdbento.access.limits import Places, with_reserve
from sdbento.background import ThreadPool

P = ParamSpec("P")
T = TypeVar("T")


class SharedThreads(ThreadPool):
    """As ThreadPool, where calls of whoever has his share of the threads wait until one ends.

    Clients without keys have `with_reserve(size)` threads. For one event loop.
    """

    def __init__(self, size: int, name: str) -> None:
        super().__init__(with_reserve(size), name)
        self._places = Places(size)
        self._waiting: list[asyncio.Future[None]] = []

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `ThreadPool.run`; the call knows who the caller is.

        A call whose result is lost keeps its place until it ends: it keeps its thread as well.
        """
        caller = current_caller()
        loop = asyncio.get_running_loop()
        while not self._places.has_room(caller):
            self._waiting.append(loop.create_future())
            await self._waiting[-1]
        call = self.submit(copy_context().run, partial(function, *args, **kwargs))
        self._places.change(caller.owner, 1)

        def end(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._give_back, caller.owner)

        call.add_done_callback(end)
        try:
            return await asyncio.wrap_future(call)
        finally:
            del call  # with an error it would be in a cycle, and the arguments stay in memory

    def _give_back(self, owner: str | None) -> None:
        self._places.change(owner, -1)
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():  # its call may have been cancelled
                future.set_result(None)
