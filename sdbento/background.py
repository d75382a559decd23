"""Work that goes on beside the requests: tasks that are noticed when they die, and thread pools.

Knows nothing of what the work is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


def start_task(
    coroutine: Coroutine[Any, Any, T],
    name: str,
    on_failure: Callable[[], None] | None = None,
) -> asyncio.Task[T]:
    """Run `coroutine` as a task of this `name`, which somebody notices when it dies.

    If it raises, the exception is logged at once and `on_failure` is called on the event loop.
    Without this nobody would know until the task is garbage-collected, if ever ("Task exception was
    never retrieved"), and whoever relies on the task would wait for ever. Being cancelled is not a
    failure. The caller must keep a reference to the task: asyncio itself keeps none.
    """
    task = asyncio.create_task(coroutine, name=name)
    task.add_done_callback(partial(_notice, on_failure))
    return task


def _notice(on_failure: Callable[[], None] | None, task: asyncio.Task[Any]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    log.error("the task %r died", task.get_name(), exc_info=error)
    if on_failure is not None:
        on_failure()


class Problem:
    """Something that fails again and again: it is logged once, and again when it is another."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._text = ""

    def note(self, text: str, exc_info: BaseException | None = None) -> None:
        if text != self._text:
            self._log.error("%s", text, exc_info=exc_info)
        self._text = text

    def solved(self) -> None:
        self._text = ""


class ThreadPool(ThreadPoolExecutor):
    """Threads for calls that block, awaited from an event loop.

    For calls that may take long, as when a host is slow: such calls would keep all the threads of
    `asyncio.to_thread` busy, which the whole process shares.
    """

    def __init__(self, size: int, name: str) -> None:
        super().__init__(size, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function` returns or raises in one of the threads.

        If this is cancelled, a call that has begun goes on and its result is lost.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self, partial(function, *args, **kwargs))
