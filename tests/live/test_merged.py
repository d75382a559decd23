"""Snapshots of several engines as one."""

from __future__ import annotations

from sdbento.live.batch import Batch, BatchImage, BatchRequest, Lane, Left, Queue, Recent
from sdbento.live.merged import Merger
from sdbento.live.snapshot import Snapshot


def snapshot(
    request: int, *, joined: bool = False, left: tuple[Left, ...] = (), calls: int = 1
) -> Snapshot:
    """An engine that computes one image of one request."""
    image = BatchImage(request, 0, 3, 9, 2, joined)
    lane = Lane("shapes", 64, 64, 1, 0.0, 2, 0.1, True, (image,))
    row = BatchRequest(request, False, "x", "DDIM", (), 0, 0, 1, 0, 0, 1.0, 2.0 * request)
    queue = Queue(0, 1, 1, 0, 2.0 * request)
    recent = Recent(calls, 2.0 * request, 1.0, 0.1)
    batch = Batch(1, 5.0, calls, recent, queue, (lane,), (row,), left, ())
    return Snapshot(batch, {request: f"owner {request}"})


def test_all_engines_are_told_of_together() -> None:
    merger = Merger()
    assert merger.merged() is None
    merger.take(1, snapshot(2, calls=3))
    merger.take(0, snapshot(1, calls=1))
    merged = merger.merged()
    assert merged is not None
    batch = merged.batch
    assert [lane.device for lane in batch.lanes] == [0, 1]
    assert [request.number for request in batch.requests] == [1, 2]
    assert batch.queue == Queue(0, 2, 2, 0, 4.0)
    assert batch.calls == 4
    assert batch.recent == Recent(4, 3.5, 1.0, 0.1)
    assert merged.owners == {1: "owner 1", 2: "owner 2"}


def joined_in(batch: Batch) -> list[int]:
    return [i.request for lane in batch.lanes for i in lane.images if i.joined]


def test_what_has_happened_is_told_exactly_once() -> None:
    merger, left = Merger(), Left(9, 0, "done")
    merger.take(0, snapshot(1, joined=True, left=(left,)))
    merger.take(1, snapshot(2))
    first, second = merger.merged(), merger.merged()
    assert first is not None and second is not None
    assert (joined_in(first.batch), first.batch.left) == ([1], (left,))
    assert (joined_in(second.batch), second.batch.left) == ([], ())
    assert second.batch.number == first.batch.number + 1


def test_what_happened_between_two_that_were_published_is_not_lost() -> None:
    merger, left = Merger(), Left(9, 0, "done")
    merger.take(0, snapshot(1, joined=True, left=(left,)))
    merger.take(0, snapshot(1))
    merged = merger.merged()
    assert merged is not None
    assert (joined_in(merged.batch), merged.batch.left) == ([1], (left,))


def test_an_engine_that_is_gone_has_nothing() -> None:
    merger = Merger()
    merger.take(0, snapshot(1))
    merger.take(1, snapshot(2))
    merger.drop(0)
    merged = merger.merged()
    assert merged is not None
    assert [lane.device for lane in merged.batch.lanes] == [1]
