from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.requests import Request

from sdbento.access.caller import Caller, acting_for
from sdbento.doors.live import api
from sdbento.doors.live.api import _texts, is_through_proxy
from sdbento.live.batch import Batch, Queue

CLIENT, PROXY = "203.0.113.7", "10.0.0.1"
V6 = "2001:db8::1"


def request(peer: str | None, **headers: str) -> Request:
    return Request(
        {
            "type": "http",
            "client": None if peer is None else (peer, 1234),
            "headers": [
                (name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()
            ],
        }
    )


@pytest.mark.parametrize(
    ("caller", "sent", "through_proxy"),
    [
        (Caller(address=CLIENT), request(CLIENT), False),
        (Caller(address=PROXY), request(PROXY, x_forwarded_for=CLIENT), True),
        (Caller(address=PROXY), request(PROXY, forwarded=f"for={CLIENT}"), True),
        (Caller(address="2001:db8::/64"), request(V6, x_forwarded_for=CLIENT), True),
        (Caller(address=CLIENT), request(PROXY, x_forwarded_for=CLIENT), False),  # it is trusted
        (Caller("alice", address=PROXY), request(PROXY, x_forwarded_for=CLIENT), False),
        (Caller(), request(None, x_forwarded_for=CLIENT), True),
    ],
)
def test_a_proxy_that_is_not_trusted_is_noticed(
    caller: Caller, sent: Request, through_proxy: bool
) -> None:
    with acting_for(caller):
        assert is_through_proxy(sent) is through_proxy


async def test_a_stream_ends_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(1, 0.0, 0, None, Queue(0, 0, 0, 0, 0.0), (), (), (), ())
    told = 0

    async def batches() -> AsyncGenerator[Batch, None]:
        nonlocal told
        while True:
            await asyncio.sleep(0.01)
            told += 1
            yield batch

    monkeypatch.setattr(api, "LONGEST", 0.1)
    texts = [text async for text in _texts(batch, batches())]
    assert len(texts) == told + 1 <= 12
    assert set(texts) == {texts[0]} and texts[0].startswith("event: batch\ndata: {")
