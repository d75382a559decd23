"""Keeps freed memory in the process, for the next call to use.

By default glibc's malloc returns large blocks to the kernel as soon as they are freed, and the next
ones cost a page fault for every 4 KB: half of the time it takes to decode an image of 1024 x 1024
on a CPU. Memory is given back once a minute and when a model is evicted: images of many sizes leave
a heap full of holes, which grow as long as nobody returns their pages. Without glibc, does nothing.
"""

from __future__ import annotations

import ctypes
import threading

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
MOST_BYTES = 2**31 - 1  # the largest value that mallopt accepts
RELEASE_EVERY = 60.0  # seconds


def keep_freed_memory() -> None:
    """Keep up to MOST_BYTES, in one heap for all threads.

    Call it before the process has a second thread. A thread that already has a heap of its own
    keeps it, and later threads inherit it; such heaps cannot hold blocks of more than 64 MB.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(M_MMAP_THRESHOLD, MOST_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, MOST_BYTES)
        libc.mallopt(M_ARENA_MAX, 1)


def release_freed_memory() -> None:
    """Give everything that is free now back to the kernel."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def start_releasing(closed: threading.Event) -> None:
    """Give freed memory back again and again until `closed`, on a thread of its own. Also beside
    requests: the heap of a server that is never idle has ever more holes."""

    def release() -> None:
        while not closed.wait(RELEASE_EVERY):
            release_freed_memory()

    threading.Thread(target=release, name="sdbento-memory", daemon=True).start()


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
