"""The clock that jobs go by."""

from __future__ import annotations

import time

import pytest

from sdbento.jobs.table import milliseconds
from tests.support.jobs import HOUR


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="needs Linux")
def test_the_time_goes_on_while_the_machine_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    read, before = time.clock_gettime_ns, milliseconds()

    def after_an_hour_asleep(clock: int) -> int:
        return read(clock) + (HOUR * 1_000_000 if clock == time.CLOCK_BOOTTIME else 0)

    monkeypatch.setattr(time, "clock_gettime_ns", after_an_hour_asleep)
    assert milliseconds() - before >= HOUR


def test_the_time_takes_no_part_in_steps_of_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    before = milliseconds()
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert 0 <= milliseconds() - before < HOUR
