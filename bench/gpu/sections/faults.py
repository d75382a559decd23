"""Sections that go wrong on purpose: each has a row first, which must survive."""

from __future__ import annotations

import os
import signal
import time

from bench.gpu.bench import Bench


def fail(bench: Bench) -> None:
    bench.row({"value": 1}, what="before")
    with bench.part(what="part"):
        raise RuntimeError("one part fails, the next is done")
    bench.row({"value": 2}, what="after")
    raise RuntimeError("out of memory, say")


def crash(bench: Bench) -> None:
    bench.row({"value": 1}, what="before")
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(bench: Bench) -> None:
    bench.row({"value": 1}, what="before")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    while True:
        time.sleep(60)
