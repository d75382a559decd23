from __future__ import annotations

from sdbento.live.batch import (
    Batch,
    BatchImage,
    BatchRequest,
    Lane,
    Queue,
    ResidentModel,
)
from sdbento.live.privacy import PROMPT_LENGTH, Watcher, seen_by
from sdbento.live.snapshot import Snapshot

SECRETS = ("a secret wish", "hidden-lora", "hers/private-model", "alice")


def request(number: int, prompt: str, loras: tuple[str, ...] = ()) -> BatchRequest:
    return BatchRequest(number, False, prompt, "Euler", loras, len(loras), 1, 1, 0, 0, 0.5, 2.0)


def lane(model: str, *requests: int) -> Lane:
    images = tuple(BatchImage(number, 0, 3, 20, 2, False) for number in requests)
    return Lane(model, 512, 512, 1, 0.0, 2, 0.1, True, images)


SNAPSHOT = Snapshot(
    Batch(
        number=1,
        time=0.0,
        calls=1,
        recent=None,
        queue=Queue(0, 2, 2, 0, 3.0),
        lanes=(lane("hers/private-model", 1), lane("shapes", 1, 2)),
        requests=(
            request(1, "a secret wish" * 20, ("hidden-lora",)),
            request(2, "a cat", ("ink",)),
        ),
        left=(),
        models=(),
    ),
    owners={1: "alice", 2: "bob"},
)
MODELS = [
    ResidentModel("hers/private-model", "model", 2.5),
    ResidentModel("shapes", "model", 0.01),
]


def seen(owner: str | None) -> Batch:
    return seen_by(Watcher(owner, {"shapes"}.__contains__), SNAPSHOT, MODELS, 3)


def test_others_requests_show_what_they_do_and_not_what_they_are() -> None:
    batch = seen("bob")
    hers, his = batch.requests
    assert (his.yours, his.prompt, his.loras) == (True, "a cat", ("ink",))
    assert (hers.yours, hers.prompt, hers.loras, hers.num_loras) == (False, None, (), 1)
    assert (hers.sampler, hers.num_controlnets) == ("Euler", 1)
    assert [one.model for one in batch.lanes] == [None, "shapes"]
    assert [one.name for one in batch.models] == [None, "shapes"]
    assert batch.models[0].memory_gb == 2.5
    assert not [secret for secret in SECRETS if secret in repr(batch)]
    assert batch.queue.preparing == 3


def test_ones_own_models_are_seen_and_prompts_begin_as_they_do() -> None:
    batch = seen("alice")
    assert batch.lanes[0].model == "hers/private-model"
    prompt = batch.requests[0].prompt
    assert prompt is not None and len(prompt) == PROMPT_LENGTH
    assert prompt.startswith("a secret wish")
    assert not batch.requests[1].yours


def test_who_cannot_be_told_from_others_has_nothing_of_his_own() -> None:
    nobodys = Snapshot(SNAPSHOT.batch, {1: None, 2: "bob"})
    batch = seen_by(Watcher(None, lambda _: True), nobodys, [], 0)
    assert not any(one.yours for one in batch.requests)
    assert all(one.prompt is None for one in batch.requests)
