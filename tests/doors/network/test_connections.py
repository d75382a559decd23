"""All connections to one port, whatever becomes of one of them."""

from __future__ import annotations

import asyncio

from sdbento.doors.network.connections import Connections
from sdbento.doors.network.limits import Limits


class Checked:
    """A connection that is never overdue, whose check may fail."""

    def __init__(self, *, fails: bool) -> None:
        self.owner: str | None = "198.51.100.1"
        self.checked = asyncio.Semaphore(0)
        self.dropped = False
        self._fails = fails

    def spare(self) -> int | None:
        return None

    def untaken(self) -> int:
        return 0

    def drop(self) -> None:
        self.dropped = True
        if self._fails:
            raise OSError("it is closed already")

    def check(self, elapsed: float) -> None:
        self.checked.release()
        if self._fails:
            raise RuntimeError("it has no transport")


async def test_one_that_cannot_be_checked_is_dropped_and_the_others_are_still_checked() -> None:
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    connections = Connections(Limits(connections=8, sweep_seconds=0.01))
    bad, good = Checked(fails=True), Checked(fails=False)
    assert connections.admit(bad) and connections.admit(good)
    for _ in range(3):
        await asyncio.wait_for(good.checked.acquire(), 30)
    assert bad.dropped and not good.dropped
    await bad.checked.acquire()
    assert bad.checked.locked()  # it was looked at once
    connections.remove(good)
