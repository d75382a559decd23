"""Where large bodies are parsed: not on the event loop, and not many of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from sdbento.access.threads import SharedThreads

P = ParamSpec("P")
T = TypeVar("T")

LARGE_BODY = 64 * 1024  # bytes; below that a thread takes longer than it helps
# The parsers take turns at the interpreter with the event loop: each more makes it wait longer.
THREADS = 2

threads = SharedThreads(THREADS, "sdbento-parser")


async def parsed(
    function: Callable[Concatenate[bytes, P], T], body: bytes, *args: P.args, **kwargs: P.kwargs
) -> T:
    """What `function` makes of `body`."""
    if len(body) < LARGE_BODY:
        return function(body, *args, **kwargs)
    return await threads.run(function, body, *args, **kwargs)
