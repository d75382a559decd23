"""What a watcher may see of the batch: more of its own requests than of those of others.

Others' prompts, LoRAs and owners stay hidden, and so do models that the watcher may not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from sdbento.engine.trajectory import Owner
from sdbento.live.batch import Batch, BatchRequest, Device, Lane, ResidentModel
from sdbento.live.snapshot import Snapshot

PROMPT_LENGTH = 80  # characters of a prompt that tell its owner which one it is


@dataclass(frozen=True)
class Watcher:
    """Who watches. owner None: he cannot be told from others, so nothing is his."""

    owner: Owner
    sees_model: Callable[[str], bool]


def seen_by(
    watcher: Watcher,
    snapshot: Snapshot,
    models: Iterable[ResidentModel],
    num_preparing: int,
    devices: Iterable[Device] = (),
) -> Batch:
    """The batch as `watcher` may see it, with what the engine does not know: the `models` in
    memory, how many requests have not come to it yet, and all `devices`."""
    batch = snapshot.batch
    own = {
        number
        for number, owner in snapshot.owners.items()
        if owner is not None and owner == watcher.owner
    }
    return replace(
        batch,
        queue=replace(batch.queue, preparing=num_preparing),
        lanes=tuple(_lane(lane, own, watcher) for lane in batch.lanes),
        requests=tuple(
            _own(one) if one.number in own else _anothers(one) for one in batch.requests
        ),
        models=tuple(_model(model, watcher) for model in models),
        devices=tuple(devices),
    )


def _own(request: BatchRequest) -> BatchRequest:
    prompt = request.prompt or ""
    return replace(request, yours=True, prompt=prompt[:PROMPT_LENGTH])


def _anothers(request: BatchRequest) -> BatchRequest:
    return replace(request, prompt=None, loras=())


def _lane(lane: Lane, own: set[int], watcher: Watcher) -> Lane:
    has_own = any(image.request in own for image in lane.images)
    if has_own or lane.model is None or watcher.sees_model(lane.model):
        return lane
    return replace(lane, model=None)


def _model(model: ResidentModel, watcher: Watcher) -> ResidentModel:
    if model.name is None or watcher.sees_model(model.name):
        return model
    return replace(model, name=None)
