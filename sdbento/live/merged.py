"""One snapshot of several engines, each of which tells of its own part of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from sdbento.live.batch import Batch, Lane, Queue, Recent
from sdbento.live.snapshot import Snapshot


class Merger:
    """Keeps the newest snapshot of each engine, by the number of its device."""

    def __init__(self) -> None:
        self._newest: dict[int, Snapshot] = {}
        self._told: dict[int, Snapshot] = {}  # those that were in the last merged one
        self._number = 0

    def take(self, device: int, snapshot: Snapshot) -> None:
        """What has happened since a snapshot that nobody was told of is not lost."""
        earlier = self._newest.get(device)
        if earlier is not None and self._told.get(device) is not earlier:
            snapshot = _with_news_of(snapshot, earlier.batch)
        lanes = tuple(replace(lane, device=device) for lane in snapshot.batch.lanes)
        self._newest[device] = replace(snapshot, batch=replace(snapshot.batch, lanes=lanes))

    def has(self, device: int) -> bool:
        """Whether its engine has told of anything."""
        return device in self._newest

    def drop(self, device: int) -> None:
        """Its engine is gone, and so is all that it had."""
        self._newest.pop(device, None)

    def merged(self) -> Snapshot | None:
        """All of them as one; None where there is none yet."""
        snapshots = [
            _without_news(snapshot) if self._told.get(device) is snapshot else snapshot
            for device, snapshot in sorted(self._newest.items())
        ]
        if not snapshots:
            return None
        self._told = dict(self._newest)
        self._number += 1
        batches = [snapshot.batch for snapshot in snapshots]
        batch = Batch(
            number=self._number,
            time=max(one.time for one in batches),
            calls=sum(one.calls for one in batches),
            recent=_recent([one.recent for one in batches if one.recent is not None]),
            queue=_queue([one.queue for one in batches]),
            lanes=tuple(lane for one in batches for lane in one.lanes),
            requests=tuple(
                sorted((r for one in batches for r in one.requests), key=lambda r: r.number)
            ),
            left=tuple(left for one in batches for left in one.left),
            models=(),
        )
        return Snapshot(batch, {k: v for one in snapshots for k, v in one.owners.items()})


def _with_news_of(snapshot: Snapshot, earlier: Batch) -> Snapshot:
    joined = {(i.request, i.image) for lane in earlier.lanes for i in lane.images if i.joined}
    batch = snapshot.batch
    lanes = tuple(
        replace(
            lane,
            images=tuple(
                replace(image, joined=image.joined or (image.request, image.image) in joined)
                for image in lane.images
            ),
        )
        for lane in batch.lanes
    )
    return replace(snapshot, batch=replace(batch, lanes=lanes, left=earlier.left + batch.left))


def _without_news(snapshot: Snapshot) -> Snapshot:
    """Nobody joins or leaves twice."""
    lanes = tuple(map(_settled, snapshot.batch.lanes))
    return replace(snapshot, batch=replace(snapshot.batch, lanes=lanes, left=()))


def _settled(lane: Lane) -> Lane:
    return replace(lane, images=tuple(replace(image, joined=False) for image in lane.images))


def _queue(queues: Sequence[Queue]) -> Queue:
    etas = [queue.eta for queue in queues]
    known = [eta for eta in etas if eta is not None]
    return Queue(
        preparing=0,
        requests=sum(queue.requests for queue in queues),
        images=sum(queue.images for queue in queues),
        waiting=sum(queue.waiting for queue in queues),
        eta=max(known) if len(known) == len(etas) else None,
    )


def _recent(recents: Sequence[Recent]) -> Recent | None:
    """The means over the calls of all."""
    if not recents:
        return None
    weights = [recent.calls for recent in recents]
    return Recent(
        calls=sum(weights),
        rows=round(fmean([one.rows for one in recents], weights), 2),
        images=round(fmean([one.images for one in recents], weights), 2),
        seconds=round(fmean([one.seconds for one in recents], weights), 5),
    )
