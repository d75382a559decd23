"""Who goes next, and how many together: arithmetic on arrivals and costs, and nothing else.

One image at a time in order of arrival makes nobody wait unfairly, and wastes what batches save.
Always full batches waste nothing, and let an image that could be done soon wait for all others.
What is chosen here lies in between, and tends to whichever costs less waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

PATIENCE = 0.1  # of the time that an image needs alone: how much later others may come and pass


def turn(submitted: float, alone: float) -> float:
    """The place in the queue, in seconds: the least goes first.

    Images go in order of arrival, but one that still needs `alone` seconds for itself lets those
    pass that need much less and come within a tenth of these seconds. However many come after that,
    they do not pass.
    """
    return submitted + PATIENCE * alone


def num_together(
    rows: Sequence[int],
    most: int,
    others: int,
    seconds: Callable[[int], float],
    full: int,
) -> int:
    """How many of the first `most` images in a queue should share the next call.

    `rows` are those of each image in the queue; `others` wait in queues of their own; `seconds` is
    the cost of a call by its rows, `full` the rows of the calls that are best in the long run.

    Taking fewer ends the call sooner, for those that take part and for everybody who waits; taking
    more saves time afterwards, for those who are then still there. The number that makes all of
    them wait least is taken: for this call and, if they are not done by it, for the rest of the
    queue. While the queue is served, about as many images come as are in it now, and wait for it.
    """
    waiting = len(rows) - 1 + others  # for all calls: the newcomers and the other queues
    totals = list(accumulate(rows))

    def cost(taken: int) -> float:
        first = (len(rows) + waiting) * seconds(totals[taken - 1])
        num_left, rows_left = len(rows) - taken, totals[-1] - totals[taken - 1]
        return first + _cost_of_rest(num_left, rows_left, waiting, seconds, full)

    return min(range(most, 0, -1), key=cost)


def _cost_of_rest(
    num_images: int, rows: int, waiting: int, seconds: Callable[[int], float], full: int
) -> float:
    """Seconds that the images left and `waiting` more wait in all, if the former go in batches."""
    if num_images == 0:
        return 0.0
    batch = min(rows, full)
    num_calls = rows / batch
    own = num_images * (num_calls + 1) / 2  # calls until an image's own is over, summed
    return seconds(batch) * (own + num_calls * waiting)
