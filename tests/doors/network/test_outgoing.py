"""Answers and how fast clients take them, second by second, on a transport that a test empties."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from itertools import count
from typing import Any, cast

import pytest

from sdbento.doors.network.limits import Limits
from sdbento.doors.network.outgoing import Outgoing
from tests.support.bounded import HANG

LIMITS = Limits()
KIB = 1024
ANSWER = bytes(20 * KIB * KIB)


class Line:
    """A transport to a client that takes what `take` says."""

    def __init__(self) -> None:
        self.waiting = 0  # bytes

    def write(self, data: bytes) -> None:
        self.waiting += len(data)

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def get_extra_info(self, name: str) -> Any:
        return None

    def take(self, num_bytes: int) -> None:
        self.waiting = max(0, self.waiting - num_bytes)


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def outgoing(line: Line) -> Outgoing:
    return Outgoing(cast(Any, line), LIMITS)


def seconds_until_stuck(outgoing: Outgoing, line: Line, taken: Iterator[int]) -> int | None:
    """None: the client takes all, or is never stuck while it takes `taken` each second."""
    for second, num_bytes in enumerate(taken):
        if outgoing.is_stuck(1.0):
            return second
        line.take(num_bytes)
    return None


def steadily(rate: int, seconds: int) -> Iterator[int]:
    return iter([rate] * seconds)


def test_a_slow_but_steady_client_gets_its_answer(outgoing: Outgoing, line: Line) -> None:
    outgoing.write(ANSWER)
    rate = 8 * KIB
    assert seconds_until_stuck(outgoing, line, steadily(rate, len(ANSWER) // rate)) is None
    assert line.waiting == 0


def test_pauses_are_forgiven_where_the_rest_is_quick(outgoing: Outgoing, line: Line) -> None:
    outgoing.write(ANSWER)
    taken = (0 if second % 25 else 200 * KIB for second in range(2600))
    assert seconds_until_stuck(outgoing, line, taken) is None
    assert line.waiting == 0


@pytest.mark.parametrize(("rate", "seconds"), [(0, 31), (1, 31), (2 * KIB, 61), (3 * KIB, 121)])
def test_one_that_drips_is_stuck_before_long(
    outgoing: Outgoing, line: Line, rate: int, seconds: int
) -> None:
    outgoing.write(ANSWER)
    stuck = seconds_until_stuck(outgoing, line, steadily(rate, 1000))
    assert stuck is not None and seconds - 1 <= stuck <= seconds + 1


def test_a_client_of_which_nothing_is_waited_for_is_not_stuck(
    outgoing: Outgoing, line: Line
) -> None:
    outgoing.write(b"the beginning of a stream")
    line.take(100)
    assert seconds_until_stuck(outgoing, line, steadily(0, 1000)) is None
    outgoing.write(ANSWER)
    assert not outgoing.is_stuck(1.0)  # it had no time to take any of it


@pytest.mark.parametrize("delay", [1, 5, 20])
def test_a_client_that_keeps_up_with_a_slow_stream_is_not_stuck(
    outgoing: Outgoing, line: Line, delay: int
) -> None:
    """What it has taken is known only `delay` seconds later, so that something always waits."""
    event = b"event: step\n\n"
    for second in count():
        outgoing.write(event)
        if second >= delay:
            line.take(len(event))
        assert not outgoing.is_stuck(1.0)
        assert outgoing.untaken() > 0
        if second == 1000:
            break


def test_a_client_that_does_not_keep_up_with_a_stream_is_stuck(
    outgoing: Outgoing, line: Line
) -> None:
    stuck = None
    for second in range(200):
        outgoing.write(bytes(100 * KIB))
        line.take(1000)
        if stuck is None and outgoing.is_stuck(1.0):
            stuck = second
    assert stuck is not None and stuck < 60


def test_what_lies_in_the_kernel_is_not_taken(line: Line) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(server.getsockname())
        ours, _ = server.accept()
        with ours:
            line.get_extra_info = lambda name: ours  # type: ignore[method-assign]
            outgoing = Outgoing(cast(Any, line), LIMITS)
            ours.setblocking(False)
            sent = ours.send(bytes(1_000_000))
            outgoing.write(bytes(sent))
            line.take(sent)  # the kernel has it
            assert sent // 2 < outgoing.untaken() <= sent
            client.settimeout(HANG)
            while sent:
                sent -= len(client.recv(sent))
            give_up = time.monotonic() + HANG
            while outgoing.untaken():  # until the last acknowledgement has come
                assert time.monotonic() < give_up
