"""The end of this process at a set time, which nothing in it can hold up.

Python waits for threads, and CUDA for its device. The kernel's alarm waits for neither.
"""

from __future__ import annotations

import signal


def end_within(seconds: int) -> None:
    """Let the kernel end this process after so many seconds, or when it was to end already."""
    left = signal.alarm(seconds)
    if 0 < left < seconds:
        signal.alarm(left)
