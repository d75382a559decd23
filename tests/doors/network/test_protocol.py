"""Connections to a real uvicorn, by clients that send too much, too slowly, or take nothing."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from sdbento.doors.network.limits import Limits
from tests.support.bounded import (
    GET,
    GET_LARGE,
    HANG,
    LARGE,
    POST,
    SLEEP,
    Door,
    answer,
    is_closed,
    listening,
)

QUICK = Limits(
    connections=8,
    refused_connections=2,
    head_seconds=0.4,
    body_seconds=0.4,
    body_rate=100_000,
    send_seconds=0.4,
    send_rate=10_000_000,
    linger_seconds=0.4,
    sweep_seconds=0.05,
)
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    """With the limits of the product."""
    with listening(Limits()) as door:
        yield door


@pytest.fixture
def quick() -> Iterator[Door]:
    with listening(QUICK) as door:
        yield door


def status(answered: bytes) -> int:
    return int(answered.split()[1])


def test_a_large_body_and_a_large_head_pass(door: Door) -> None:
    with door.connect(POST, b"Content-Length: 3000000\r\n\r\n", b"x" * 3_000_000) as client:
        assert b"3000000" in answer(client)
        client.sendall(b"GET /%s HTTP/1.1\r\nHost: x\r\n" % (b"a" * 8000))
        client.sendall(b"X: %s\r\n" % (b"b" * 2000) * 10)
        client.sendall(b"\r\n")
        assert status(answer(client)) == 200


def test_a_body_of_tiny_chunks_passes(door: Door) -> None:
    assert b"\r\n100000\r\n" in door.ask(CHUNKED, b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 9000), 414),
        (b"GET /%s" % (b"a" * 20_000_000), 414),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1_000_000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: %s\r\n\r\n" % (b"a" * 33_000), 431),
        (b"GET / HTTP/1.1\r\nX: %s" % (b"a" * 20_000_000), 431),
        (b"GET / HTTP/1.1\r\n%s" % (b"a" * 20_000_000), 431),
        (b"\r\n" * 1_000_000, 431),
        (CHUNKED + b"1\r\nx\r\n0\r\n" + b"a: b\r\n" * 1_000_000 + b"\r\n", 431),
        (CHUNKED + b"1\r\nx\r\n0\r\nX: %s" % (b"a" * 20_000_000), 431),
        (CHUNKED + b"1;%s" % (b"a" * 20_000_000), 431),
        (CHUNKED + b"1;%s\r\nx\r\n" % (b"a" * 1000) * 1000 + b"0\r\n\r\n", 431),
        (b"no HTTP at all\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Type: \xff\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n", 400),
        (b"GET http://y/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    ],
    ids=lambda value: value[:40].decode("latin-1") if isinstance(value, bytes) else str(value),
)
def test_heads_and_framing_without_end_are_refused(door: Door, sent: bytes, expected: int) -> None:
    with door.connect() as client:
        client.settimeout(HANG)
        try:
            client.sendall(sent)
        except ConnectionError:
            pytest.fail("the answer was lost")
        answered = answer(client)
        assert status(answered) == expected, answered
        assert b'{"error":{"type":"malformed_request","message":"' in answered
        assert b"connection: close" in answered
    assert door.ask(GET).startswith(b"HTTP/1.1 200")


def test_requests_may_be_sent_ahead_but_not_without_end(door: Door) -> None:
    with door.connect(GET * 5) as client:
        data = b""
        while data.count(b"HTTP/1.1 200") < 5 or not data.endswith(b"0\r\n\r\n"):
            data += client.recv(65536)
    with door.connect(SLEEP + GET * 1000) as client:
        assert is_closed(client)


def test_whoever_asks_as_proxies_do_is_answered(door: Door) -> None:
    assert door.ask(b"GET http://X/ HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert door.ask(b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_an_application_that_answers_while_its_client_is_cut_off_does_not_fail(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        with door.connect(GET * 50) as client:
            while client.recv(65536):
                pass
    assert not [record for record in caplog.records if record.exc_info]


def test_an_upgrade_is_not_taken(door: Door) -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n"
    for protocol in (b"websocket", b"h2c"):
        with door.connect(head % protocol) as client:
            answered = answer(client)
            assert status(answered) == 200 and b"connection: close" in answered
            assert is_closed(client)


def test_a_body_is_asked_for_when_it_is_wanted(door: Door) -> None:
    with door.connect(POST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n") as client:
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc")
        assert b"\r\n3\r\n" in answer(client)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"", None),
        (b"\r\n", None),
        (b"GET / HT", 408),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX", 408),
        (POST + b"Content-Length: 100\r\n\r\n", 408),
        (POST + b"Content-Length: 100\r\n\r\nxyz", 408),
        (CHUNKED + b"5\r\nxyz", 408),
    ],
)
def test_who_sends_nothing_more_is_cut_off(quick: Door, sent: bytes, expected: int | None) -> None:
    answered = quick.ask(sent)
    assert status(answered) == expected if expected else answered == b""


@pytest.mark.parametrize(
    "head", [b"", POST + b"Content-Length: 100000\r\n\r\n", CHUNKED + b"FFFF\r\n"]
)
def test_who_drips_is_cut_off(quick: Door, head: bytes) -> None:
    dripped = 0
    with quick.connect(head or b"GET /") as client:
        client.settimeout(0.05)
        give_up = time.monotonic() + HANG
        while time.monotonic() < give_up:
            try:
                answered = client.recv(1000)
            except TimeoutError:
                client.sendall(b"a")
                dripped += 1
            else:
                break
        assert status(answered) == 408 and dripped > 2


def test_a_body_may_take_long_if_it_comes_steadily(quick: Door) -> None:
    parts = 30  # of 50 ms: much longer than it may stand still
    with quick.connect(POST, b"Content-Length: %d\r\n\r\n" % (parts * 20_000)) as client:
        for _ in range(parts):
            client.sendall(b"x" * 20_000)
            time.sleep(0.05)
        assert b"\r\n600000\r\n" in answer(client)


def test_an_answer_may_be_waited_for(quick: Door) -> None:
    with quick.connect(SLEEP) as client:
        client.settimeout(1.5)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_who_takes_nothing_of_its_answer_is_cut_off(quick: Door) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(HANG)
        client.connect(("127.0.0.1", quick.port))
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: quick.num_connections == 1)
        wait_for(lambda: quick.num_connections == 0)


def test_who_takes_its_answer_too_slowly_is_cut_off(quick: Door) -> None:
    with quick.connect(GET_LARGE) as client:
        taken = 0
        give_up = time.monotonic() + HANG
        with suppress(ConnectionError):
            while more := client.recv(200_000):
                taken += len(more)
                assert taken < LARGE and time.monotonic() < give_up
                time.sleep(0.05)
        assert quick.num_connections == 0


def test_of_answers_that_are_not_taken_those_are_given_up_of_whoever_has_most() -> None:
    limits = Limits(untaken_bytes=LARGE * 5 // 2, sweep_seconds=0.05)
    with listening(limits) as door, door.connect(GET_LARGE) as one:
        wait_for(lambda: door.num_connections == 1)
        with door.connect(GET_LARGE, source="127.0.0.2") as other:
            with door.connect(GET_LARGE) as another:
                wait_for(lambda: door.num_connections == 2)
                assert len(answer(other)) > LARGE
                for client in (one, another):
                    client.settimeout(HANG)
                whole = [len(answer(client)) > LARGE for client in (one, another)]
                assert sorted(whole) == [False, True]


def test_the_rest_of_a_body_is_waited_for_only_briefly_once_it_is_answered(quick: Door) -> None:
    early = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n"
    with quick.connect(early) as client:
        assert status(answer(client)) == 200
        assert is_closed(client)
    with quick.connect(early) as client:
        assert status(answer(client)) == 200
        client.sendall(b"x" * 9_000_000)
        client.sendall(GET)
        assert status(answer(client)) == 200


def test_whoever_holds_all_connections_does_not_keep_others_out() -> None:
    with listening(Limits(connections=8)) as door:
        waiting = [door.connect(*sent) for sent in ([], [b"GET"], [CHUNKED]) * 4]
        for _ in range(10):
            assert door.ask(GET).startswith(b"HTTP/1.1 200")
        assert door.num_connections <= 8
        for client in waiting:
            client.close()


def test_an_address_has_half_of_the_connections(quick: Door) -> None:
    busy = [quick.connect(SLEEP) for _ in range(4)]
    wait_for(lambda: quick.num_connections == 4)
    refused = quick.ask(GET)
    assert status(refused) == 503 and b"retry-after: 5" in refused.lower()
    with quick.connect(GET, source="127.0.0.2") as client:
        assert status(answer(client)) == 200
    for client in busy:
        client.close()
    wait_for(lambda: quick.num_connections == 0)
    assert status(quick.ask(GET)) == 200


def test_those_that_are_refused_are_few_as_well(quick: Door) -> None:
    busy = [quick.connect(SLEEP) for _ in range(4)]
    wait_for(lambda: quick.num_connections == 4)
    clients = [quick.connect() for _ in range(20)]
    wait_for(lambda: quick.num_connections <= 6)
    for client in busy + clients:
        client.close()


def wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)
