"""Messages between two ends, here both in this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from sdbento.backend.pool.channel import Channel
from tests.support.images import gradient, half_mask

LARGE = bytes(32 * 1024 * 1024)  # far more than a socket holds

End = tuple[Channel[Any], "SimpleQueue[Any]", threading.Event]


def started(end: socket.socket) -> End:
    channel, inbox, ended = Channel[Any](end, "test"), SimpleQueue[Any](), threading.Event()
    channel.start(inbox.put, ended.set)
    return channel, inbox, ended


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    one, other = (started(end) for end in socket.socketpair())
    yield one, other
    one[0].close()
    other[0].close()


def test_messages_come_in_order_whatever_their_size(ends: tuple[End, End]) -> None:
    (one, _, _), (_, inbox, _) = ends
    sent = ["first", LARGE, {"last": 3}]
    for message in sent:
        one.send(message)
    assert [inbox.get(timeout=30) for _ in sent] == sent


def test_sending_waits_for_nobody_and_all_of_it_comes_before_the_end() -> None:
    ours, theirs = socket.socketpair()
    one, _, _ = started(ours)
    one.send(LARGE)  # nobody reads yet
    other, inbox, ended = started(theirs)
    one.close()
    assert inbox.get(timeout=30) == LARGE
    assert ended.wait(30)
    other.close()


def test_images_and_tensors_come_as_they_are(ends: tuple[End, End]) -> None:
    (one, _, _), (_, inbox, _) = ends
    picture, palette = gradient(40, 30), gradient(8, 8).convert("P")
    images = [picture, picture.convert("L"), picture.convert("RGBA"), palette, half_mask(9, 5)]
    tensors = [torch.rand(1, 3, 8, 6), torch.rand(4, 6).t(), torch.arange(3)]
    one.send((images, tensors))
    came, others = inbox.get(timeout=30)
    for image, sent in zip(came, images, strict=True):
        assert (image.mode, image.size, image.tobytes()) == (sent.mode, sent.size, sent.tobytes())
        assert image.convert("RGB").tobytes() == sent.convert("RGB").tobytes()
        image.putpixel((0, 0), 0)  # it can be changed
    for tensor, expected in zip(others, tensors, strict=True):
        assert torch.equal(tensor, expected)
        tensor.zero_()


def test_a_message_that_cannot_be_pickled_is_left_out(
    ends: tuple[End, End], caplog: pytest.LogCaptureFixture
) -> None:
    (one, _, _), (_, inbox, _) = ends
    one.send(threading.Lock())
    one.send("next")
    assert inbox.get(timeout=30) == "next"
    assert "could not be sent: lock" in caplog.text


def test_the_end_of_the_other_is_told_once_and_sending_goes_on_without_effect(
    ends: tuple[End, End],
) -> None:
    (one, _, ended), (other, _, _) = ends
    other.close()
    assert ended.wait(30)
    one.send("nobody reads this")
