"""A faster start of the process, which spends most of it on imports."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause the garbage collector while torch and the like are imported, and hide them from it.

    They create half a million objects that live as long as the process. Collections while they are
    imported take a quarter of the time, and each full collection later would stop all threads for
    0.3 s. Whatever exists at the end of the block is never collected, so load models after it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
