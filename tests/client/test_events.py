"""The server's messages as events, and what they tell of the progress."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from PIL import Image

from sdbento.client.errors import NotUnderstood
from sdbento.client.events import (
    Preview,
    Progress,
    Queued,
    Step,
    message_in,
    to_batch,
    to_event,
)
from sdbento.engine.handle import Stepped
from sdbento.errors import DeadlineExceeded
from sdbento.live.batch import Batch, Left, Queue
from sdbento.request import events as server


def told(event: server.Event) -> list[Any]:
    return [to_event(message) for message in server.messages(event)]


def test_events_come_out_as_they_went_in() -> None:
    assert told(server.Queued(3)) == [Queued(3, None)]
    assert told(server.Queued(3, 1.5)) == [Queued(3, 1.5)]
    assert told(Stepped(image=1, step=2, num_steps=4, eta=0.5)) == [Step(1, 2, 4, 0.5)]
    preview = Image.new("RGB", (8, 6))
    step, seen = told(Stepped(image=1, step=2, num_steps=4, eta=0.5, preview=preview))
    assert step == Step(1, 2, 4, 0.5)
    assert isinstance(seen, Preview) and (seen.image, seen.step, seen.num_steps) == (1, 2, 4)
    assert seen.to_pil().size == (8, 6)


def test_an_error_event_is_raised() -> None:
    body = DeadlineExceeded("too late", param="timeout").to_body()
    with pytest.raises(DeadlineExceeded, match="too late"):
        to_event({"event": "error", **body})


def test_an_event_of_a_newer_server_is_passed_over() -> None:
    assert to_event({"event": "applause"}) is None


BROKEN: list[dict[str, Any]] = [
    {},
    {"event": "step"},
    {"event": "done"},
    {"event": "done", "response": {"images": ["AA=="]}},
    {"event": "preview", "image": 0, "step": 1, "num_steps": 2, "preview": 5},
    {"event": "error"},
    {"event": "error", "error": "x"},
]


@pytest.mark.parametrize("message", BROKEN, ids=str)
def test_what_no_server_of_ours_sends_is_not_understood(message: dict[str, Any]) -> None:
    with pytest.raises(NotUnderstood):
        to_event(message)


def test_only_lines_with_data_hold_messages() -> None:
    assert message_in('data: {"event": "queued"}') == {"event": "queued"}
    for line in ("", ": keep-alive", "event: step", "retry: 5"):
        assert message_in(line) is None
    for line in ("data: {", "data: 5", 'data: "x"', "data:"):
        with pytest.raises(NotUnderstood):
            message_in(line)


def test_progress_is_the_mean_of_the_images() -> None:
    progress = Progress(2)
    assert progress.share == 0.0
    for image, step, share in ((0, 2, 0.25), (1, 1, 0.375), (0, 4, 0.625), (1, 4, 1.0)):
        [message] = server.messages(Stepped(image=image, step=step, num_steps=4, eta=0.0))
        progress.take(message)
        assert progress.share == share
    assert progress.generation is None


BATCH = Batch(3, 1.5, 9, None, Queue(0, 0, 0, 0, None), (), (), (Left(1, 0, "paused"),), ())


def test_a_snapshot_comes_out_as_it_went_in_also_from_a_newer_server() -> None:
    message = asdict(BATCH)
    assert to_batch(message) == BATCH
    assert to_batch(message | {"weather": "fine"}) == BATCH


def test_what_is_no_snapshot_is_told() -> None:
    with pytest.raises(NotUnderstood, match="snapshot"):
        to_batch({"event": "batch", "number": "many"})
    with pytest.raises(DeadlineExceeded, match="too late"):
        to_batch({"event": "error", **DeadlineExceeded("too late").to_body()})
