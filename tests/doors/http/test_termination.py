"""SIGTERM: who is notified, in which order, and that only the main thread can handle it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading

from sdbento.doors.http.termination import on_termination


async def test_the_application_is_notified_and_the_servers_own_handler_runs() -> None:
    notified = asyncio.Event()
    served: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: served.append(number))
    try:
        server = signal.getsignal(signal.SIGTERM)
        with on_termination(notified.set):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(notified.wait(), 10)
            assert served == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is server
    finally:
        signal.signal(signal.SIGTERM, before)


def test_off_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    during = []

    def run() -> None:
        with on_termination(lambda: None):
            during.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert during == [before]


def test_the_process_ends_in_time_even_if_its_event_loop_hangs() -> None:
    code = """
import asyncio, os, signal, time
from sdbento.doors.http.termination import on_termination
async def main():
    with on_termination(lambda: None, limit=0.5):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == -signal.SIGALRM


def test_an_end_that_was_set_earlier_stays() -> None:
    code = """
import time
from sdbento.process.deadline import end_within
end_within(1)
end_within(60)
time.sleep(30)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=20).returncode == -signal.SIGALRM
