"""How much one call may hold on a device that has run out of memory; learned in service.

A cap comes into being with the first failure. It is lowered when a call fails, and raised by a step
after so many full calls that worked, since memory that was short may be there again. Every step
that was one too many doubles the calls until the next, so that a limit which stays costs less and
less. Knows neither planner nor torch.
"""

from __future__ import annotations

FIRST_PATIENCE = 64  # full calls that must work before a cap is raised
LAST_PATIENCE = 1024


class Cap:
    """The cap of one kind of call: `limit` rows of a step, or images, raised by `step`."""

    def __init__(self, limit: int, step: int) -> None:
        self.limit = limit
        self._step = step
        self._proven = 0  # as much has worked since the cap was last halved
        self._patience = FIRST_PATIENCE
        self._successes = 0

    def failed(self, size: int) -> None:
        """A call that held so much ran out of memory: back to what has worked, else to half."""
        if 0 < self._proven < size:
            self.limit = self._proven
            self._patience = min(2 * self._patience, LAST_PATIENCE)
        else:
            self.limit = min(self.limit, max(1, size // 2))
            self._proven = 0
        self._successes = 0

    def succeeded(self, size: int) -> None:
        """A call that held so much has worked."""
        if size > self._proven > 0:
            self._patience = FIRST_PATIENCE  # there is more memory than there was
        self._proven = max(size, self._proven)
        if size > self.limit - self._step:  # full: no more would have fitted
            self._successes += 1
        if self._successes >= self._patience:
            self.limit += self._step
            self._successes = 0
