from __future__ import annotations

from dataclasses import replace

from sdbento.live.batch import Batch, BatchImage, BatchRequest, Lane, Queue
from sdbento.live.stats import ImageStats, LaneStats, MemoryStats, RequestStats, stats_of

MEMORY = MemoryStats(1.0, 8.0, 4.0)
REQUEST = BatchRequest(1, False, None, "Euler", (), 0, 0, 4, 0, 0, 1.0, 2.0)
LANE = Lane("shapes", 64, 64, 1, 0.0, 6, 0.25, True, (BatchImage(1, 0, 2, 8, 2, False),) * 3)


def test_requests_and_images_are_counted_by_state() -> None:
    requests = (
        REQUEST,
        replace(REQUEST, number=2, num_waiting=3),  # one of its four has begun
        replace(REQUEST, number=3, num_waiting=4),
    )
    queue = Queue(preparing=2, requests=103, images=411, waiting=406, eta=9.5)
    batch = Batch(1, 0.0, 5, None, queue, (LANE,), requests, (), ())
    stats = stats_of(batch, version="1", uptime=2.04, ready=True, memory=MEMORY, jobs=None)
    assert stats.requests == RequestStats(preparing=2, waiting=101, running=2)
    assert stats.images == ImageStats(waiting=406, running=5)
    assert stats.lanes == (LaneStats("shapes", 64, 64, images=3, rows=6, seconds=0.25),)
    assert (stats.eta, stats.uptime, stats.jobs) == (9.5, 2.0, None)
