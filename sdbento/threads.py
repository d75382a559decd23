"""Who computes with torch on a CPU: the engine's thread with all cores, every other with one.

A thread that has computed with several keeps its team of OpenMP threads for as long as it lives.
Once all teams together have more threads than the machine has cores, libgomp no longer spins
between two operators but sleeps, and each of the 300 operators of a UNet call pays for a wake-up:
one image alone then takes twice as long. Neither OMP_WAIT_POLICY nor OMP_NUM_THREADS changes that.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial

import torch


@cache
def num_cores() -> int:
    """Threads that torch would compute with if nobody had told it (OMP_NUM_THREADS can)."""
    return torch.get_num_threads()


def compute_only_on(call: Callable[[Callable[[], None]], Future[None]], num_threads: int) -> None:
    """Let the thread that `call` runs functions on compute with `num_threads`, all others with one.

    Threads that have computed before keep what they have, but for the one that calls this.
    """
    call(partial(_use, num_threads)).result()
    torch.set_num_threads(1)  # and for every thread that has not computed with torch yet


def _use(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    torch.get_num_threads()  # a thread's first look makes the number its own
