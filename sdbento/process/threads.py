"""How many cores torch uses on a CPU: all of them in the engine's thread, one in every other.

A thread that has computed on several cores keeps its team of OpenMP threads as long as it lives.
When all teams together have more threads than the machine has cores, libgomp sleeps between two
operators instead of spinning, and each of the 300 operators of a UNet call waits for a wake-up. The
symptom: a single image takes twice as long. Neither OMP_WAIT_POLICY nor OMP_NUM_THREADS helps.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial

import torch


@cache
def num_cores() -> int:
    """The number of threads that torch uses by default (or OMP_NUM_THREADS, if that is set)."""
    return torch.get_num_threads()


def compute_only_on(call: Callable[[Callable[[], None]], Future[None]], num_threads: int) -> None:
    """Let torch use `num_threads` in the thread that `call` runs functions on, and one in others.

    A thread that has already computed keeps its number, except for the one that calls this.
    """
    call(partial(_use, num_threads)).result()
    torch.set_num_threads(1)  # also for every thread that has not used torch yet


def _use(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    torch.get_num_threads()  # the first query fixes the number for this thread
