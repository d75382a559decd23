"""A process does not outlive the one that started it, whatever has ended that one."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

SOON = 60.0  # seconds, many times what anything here takes

# The parent prints the id of its child, and when that says that it watches, ends or waits.
PARENT = """
import os, subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE
)
child.stdout.readline() if sys.argv[2] == "wait" else None
print(child.pid, flush=True)
sys.stdin.read()
"""
CHILD = """
import os, signal, sys, time
from sdbento.process.parent import end_with_parent
parent = int(sys.argv[1])
{first}
end_with_parent(parent, drain_seconds=1)
print("watching", flush=True)
while True: time.sleep(1)
"""
POLITE = ""
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
LATE = "while os.getppid() == parent: time.sleep(0.01)"


@pytest.mark.parametrize(("first", "when"), [(POLITE, "wait"), (DEAF, "wait"), (LATE, "at once")])
def test_a_child_ends_when_its_parent_was_killed(first: str, when: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD.format(first=first), when],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        assert child.is_running()
        parent.kill()
        child.wait(SOON)  # raises TimeoutExpired
    finally:
        parent.communicate()
        if child.is_running():
            child.kill()


def test_a_child_goes_on_for_as_long_as_its_parent() -> None:
    command = [sys.executable, "-c", CHILD.format(first=POLITE), str(os.getpid())]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"watching\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1.0)
    finally:
        child.kill()
        child.communicate()
