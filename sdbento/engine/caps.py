"""How large a call may be on a device that has run out of memory; learned while serving.

A cap exists from the first failure on. It is lowered when a call fails, and raised by a step after
enough full calls have worked, since memory that was short may be free again. Each step that turns
out to be too much doubles the number of calls until the next, so that a limit that never goes away
costs less and less. Knows neither planner nor torch.
"""

from __future__ import annotations

FIRST_TRIAL = 64  # full calls that must work before a cap is raised
LONGEST_TRIAL = 1024


class Cap:
    """The cap of one kind of call: `limit` rows of a step, or images, raised by `step`."""

    def __init__(self, limit: int, step: int) -> None:
        self.limit = limit
        self._step = step
        self._proven = 0  # the largest call that has worked since the cap was last halved
        self._trial = FIRST_TRIAL
        self._successes = 0

    def failed(self, size: int) -> None:
        """A call of that size ran out of memory: back to what has worked, else to half."""
        if 0 < self._proven < size:
            self.limit = self._proven
            self._trial = min(2 * self._trial, LONGEST_TRIAL)
        else:
            self.limit = min(self.limit, max(1, size // 2))
            self._proven = 0
        self._successes = 0

    def succeeded(self, size: int) -> None:
        """A call of that size has worked."""
        if size > self._proven > 0:
            self._trial = FIRST_TRIAL  # there is more memory than there was
        self._proven = max(size, self._proven)
        if size > self.limit - self._step:  # it was full
            self._successes += 1
        if self._successes >= self._trial:
            self.limit += self._step
            self._successes = 0
