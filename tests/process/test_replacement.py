"""`sdbento.process.replacement`: a process of its own, in which Python's end hangs."""

from __future__ import annotations

import signal
import subprocess
import sys

PROGRAM = """
import signal, sys, threading
from sdbento.process import replacement
replacement.LINGER, replacement.LIMIT = 0.1, 1
if sys.argv[1] == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=threading.Event().wait).start()  # Python waits for it
replacement.end_process(can_finish=sys.argv[1] == "finishes")
if sys.argv[1] == "finishes":
    threading.Event().wait()
"""


def ends_by(how: str) -> int:
    program = subprocess.run([sys.executable, "-c", PROGRAM, how], timeout=60, check=False)
    return -program.returncode


def test_a_process_ends_as_if_it_was_asked_to() -> None:
    assert ends_by("finishes") == signal.SIGTERM


def test_a_process_ends_although_something_in_it_hangs() -> None:
    assert ends_by("hangs") == signal.SIGALRM
