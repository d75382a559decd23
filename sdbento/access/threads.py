"""Threads for slow calls, such as to other hosts, of which each caller has a share only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

from sdbento.access.caller import current_caller
from sdbento.access.limits import with_reserve
from sdbento.access.places import HostPlaces
from sdbento.background import ThreadPool

P = ParamSpec("P")
T = TypeVar("T")


class SharedThreads(ThreadPool):
    """As ThreadPool, where calls of whoever has his share of the threads wait until one ends, in
    the order in which they came.

    Clients without keys have `with_reserve(size)` threads.
    """

    def __init__(self, size: int, name: str) -> None:
        super().__init__(with_reserve(size), name)
        self._places = HostPlaces(size, each=size)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `ThreadPool.run`; the call knows who the caller is.

        A call whose result is lost keeps its place until it ends: it keeps its thread as well.
        """
        visit = await self._places.take(current_caller())
        try:
            call = self.submit(copy_context().run, partial(function, *args, **kwargs))
        except BaseException:
            self._places.give_back(visit)
            raise
        call.add_done_callback(lambda _: self._places.give_back(visit))
        try:
            return await asyncio.wrap_future(call)
        finally:
            del call  # with an error it would be in a cycle, and the arguments stay in memory
