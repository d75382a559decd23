"""The start of a process, which waits for imports above all."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Import torch and its kin without the garbage collector, and out of its sight for good.

    They make half a million objects that live as long as the process. To look through them again
    and again while they come is a quarter of the time they take; and every full collection later
    would hold all threads for 0.3 s. Whatever exists at the end is never collected: models must be
    loaded afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
