"""Memory that was freed stays with the process, for the next call to use.

By default glibc's malloc gives large blocks back to the kernel as soon as they are freed, and the
next ones cost a page fault for every 4 KB: half of the time of decoding a picture of 1024 x 1024 on
a CPU. Idle processes and evicted models give theirs back. Without glibc nothing here does anything.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
MOST_BYTES = 2**31 - 1  # the largest value that mallopt takes


def keep_freed_memory() -> None:
    """Keep up to MOST_BYTES, in one heap for all threads.

    To be called before the process has a second thread: one that has a heap of its own keeps it,
    and hands it on when it ends, and such heaps cannot have blocks of more than 64 MB.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(M_MMAP_THRESHOLD, MOST_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, MOST_BYTES)
        libc.mallopt(M_ARENA_MAX, 1)


def release_freed_memory() -> None:
    """Give the kernel all that is free now."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
