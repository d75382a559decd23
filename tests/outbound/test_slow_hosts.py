"""Hosts that are slow on purpose: who waits for them, and who does not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable

import pytest

from sdbento.access.caller import ANYBODY, Caller, acting_for
from sdbento.access.places import HostPlaces
from sdbento.errors import InvalidParameter, LimitReached, Unavailable
from sdbento.outbound import names
from sdbento.outbound.http import (
    CONNECTIONS,
    CONNECTIONS_TO_A_HOST,
    Body,
    Outbound,
)
from sdbento.outbound.names import LOOKUPS, LOOKUPS_IN_A_DOMAIN
from sdbento.settings import Settings
from tests.support.hosts import Hosts, hosting
from tests.support.job_server import until

SETTINGS = Settings(allow_private_urls=True, fetch_timeout=60)
ALICE, BOB = Caller("alice", shares=True), Caller("bob", shares=True)
HANG = 20.0  # seconds after which something hangs


async def get(outbound: Outbound, url: str) -> bytes:
    async with outbound.fetched(url, max_bytes=1000, param="image") as body:
        return body


def fetching(outbound: Outbound, caller: Caller, urls: Iterable[str]) -> list[asyncio.Task[bytes]]:
    with acting_for(caller):
        return [asyncio.create_task(get(outbound, url)) for url in urls]


async def fetched(outbound: Outbound, caller: Caller, url: str) -> bytes:
    [task] = fetching(outbound, caller, [url])
    return await asyncio.wait_for(task, HANG)


async def cancel(tasks: list[asyncio.Task[bytes]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def slow_urls(hosts: Hosts, num: int) -> list[str]:
    return [hosts.url(f"slow-{i}.evil{i}.example") for i in range(num)]


async def test_many_slow_hosts_of_one_do_not_delay_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(monkeypatch, num_addresses=50) as hosts:
        outbound = Outbound(SETTINGS)
        slow = fetching(outbound, ALICE, slow_urls(hosts, 600))
        await until(lambda: hosts.connected.total() == CONNECTIONS // 2)
        assert await fetched(outbound, BOB, hosts.url("quick-1.good.example")) == b"picture"
        assert hosts.connected.total() == CONNECTIONS // 2
        hosts.answer.set()
        assert await asyncio.gather(*slow) == [b"picture"] * 600


async def test_a_slow_host_does_not_delay_the_other_hosts_of_the_same_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosting(monkeypatch, num_addresses=2) as hosts:
        outbound = Outbound(SETTINGS)
        slow = fetching(outbound, ANYBODY, [hosts.url("slow-0.example")] * 300)
        await until(lambda: hosts.connected["slow-0.example"] == CONNECTIONS_TO_A_HOST)
        assert await fetched(outbound, ANYBODY, hosts.url("quick-1.example")) == b"picture"
        assert hosts.connected.total() == CONNECTIONS_TO_A_HOST
        await cancel(slow)


async def test_names_that_lead_to_one_address_are_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(monkeypatch) as hosts:
        outbound = Outbound(SETTINGS)
        slow = fetching(outbound, ALICE, slow_urls(hosts, 100))
        await until(lambda: hosts.connected.total() == CONNECTIONS_TO_A_HOST)
        assert await fetched(outbound, BOB, hosts.url("quick-0.example")) == b"picture"
        assert hosts.connected.total() == CONNECTIONS_TO_A_HOST
        await cancel(slow)


async def test_who_waits_too_long_for_the_own_hosts_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosting(monkeypatch) as hosts:
        outbound = Outbound(SETTINGS.model_copy(update={"fetch_timeout": 2.0}))
        slow = fetching(outbound, ALICE, slow_urls(hosts, 40))
        errors = await asyncio.gather(*slow, return_exceptions=True)
        waited = [error for error in errors if isinstance(error, LimitReached)]
        too_slow = [error for error in errors if isinstance(error, InvalidParameter)]
        assert len(waited) + len(too_slow) == 40
        assert len(too_slow) >= CONNECTIONS_TO_A_HOST and len(waited) >= CONNECTIONS_TO_A_HOST
        assert all("SDBENTO_FETCH_TIMEOUT" in error.message for error in too_slow)
        assert await fetched(outbound, ALICE, hosts.url("quick-0.example")) == b"picture"


async def test_a_fetch_that_is_cancelled_closes_its_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosting(monkeypatch) as hosts:
        outbound = Outbound(SETTINGS)
        slow = fetching(outbound, ALICE, slow_urls(hosts, 3 * CONNECTIONS_TO_A_HOST))
        await until(lambda: hosts.connected.total() == CONNECTIONS_TO_A_HOST)
        await cancel(slow)
        await until(lambda: hosts.connected.total() == 0)
        assert await fetched(outbound, ALICE, hosts.url("quick-0.example")) == b"picture"


async def test_places_of_a_cancelled_fetch_go_to_those_who_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosting(monkeypatch) as hosts:
        outbound = Outbound(SETTINGS)
        slow = fetching(outbound, ALICE, [hosts.url("slow-0.example")] * CONNECTIONS_TO_A_HOST)
        await until(lambda: hosts.connected.total() == CONNECTIONS_TO_A_HOST)
        waiting = fetching(outbound, ALICE, [hosts.url("quick-0.example")] * 3)
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        await cancel(waiting[:1])
        await cancel(slow)
        assert await asyncio.gather(*waiting[1:]) == [b"picture"] * 2


async def test_memory_is_shared_between_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(monkeypatch, body=b"x" * 400) as hosts:
        outbound, url = Outbound(SETTINGS, max_memory=1000), hosts.url("quick-0.example")
        with acting_for(ALICE):
            async with outbound.fetched(url, max_bytes=1000, param="image"):
                with pytest.raises(LimitReached, match="memory"):
                    await get(outbound, url)
                assert await fetched(outbound, BOB, url) == b"x" * 400
            assert await get(outbound, url) == b"x" * 400


# Names


class HangingNames:
    """A resolver that never answers for names that begin with "hang", until `answer` is set."""

    def __init__(self) -> None:
        self.answer = threading.Event()
        self.num_asked = 0

    def look_up(self, name: str, port: int) -> list[str]:
        self.num_asked += 1
        if name.startswith("hang"):
            self.answer.wait(HANG)
        return ["127.0.0.1"]


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterable[HangingNames]:
    hanging = HangingNames()
    monkeypatch.setattr(names, "_places", HostPlaces(LOOKUPS, LOOKUPS_IN_A_DOMAIN))
    yield hanging
    hanging.answer.set()


async def test_names_that_never_resolve_hold_up_nobody_else(
    hanging: HangingNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosting(monkeypatch) as hosts:
        monkeypatch.setattr(names, "look_up", hanging.look_up)
        outbound = Outbound(SETTINGS)
        urls = [f"http://hang.evil{i}.example/" for i in range(400)]
        slow = fetching(outbound, ALICE, urls)
        await until(lambda: hanging.num_asked == LOOKUPS // 2)
        assert await fetched(outbound, BOB, hosts.url("quick.example")) == b"picture"
        # Threads that nobody waits for any more count as well.
        await cancel(slow)
        more = fetching(outbound, ALICE, urls)
        await asyncio.sleep(0.1)
        assert hanging.num_asked == LOOKUPS // 2 + 1
        assert await fetched(outbound, BOB, hosts.url("quick.example")) == b"picture"
        await cancel(more)
        hanging.answer.set()
        assert await fetched(outbound, ALICE, hosts.url("quick.example")) == b"picture"


async def test_a_domain_whose_name_server_hangs_does_not_delay_other_domains(
    hanging: HangingNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hosting(monkeypatch) as hosts:
        monkeypatch.setattr(names, "look_up", hanging.look_up)
        outbound = Outbound(SETTINGS)
        slow = fetching(outbound, ANYBODY, [f"http://hang{i}.evil.co.uk/" for i in range(400)])
        await until(lambda: hanging.num_asked == LOOKUPS_IN_A_DOMAIN)
        assert await fetched(outbound, ANYBODY, hosts.url("quick.co.uk")) == b"picture"
        assert hanging.num_asked == LOOKUPS_IN_A_DOMAIN + 1
        await cancel(slow)


async def test_the_system_may_have_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with hosting(monkeypatch) as hosts:
        outbound, url = Outbound(SETTINGS), hosts.url("quick-0.example")
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            for _ in range(2 * LOOKUPS_IN_A_DOMAIN):
                with pytest.raises(Unavailable, match="no more threads"):
                    await get(outbound, url)
        assert await get(outbound, url) == b"picture"


async def test_what_is_sent_is_limited_as_what_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(monkeypatch) as hosts:
        outbound = Outbound(SETTINGS)

        async def send(name: str) -> int:
            body = Body.of(b"x" * 200_000)
            answer = await outbound.send("PUT", hosts.url(name), body, {}, param="webhook")
            return answer.status

        slow = [asyncio.create_task(send("slow-0.example")) for _ in range(30)]
        await until(lambda: hosts.connected.total() == CONNECTIONS_TO_A_HOST)
        with acting_for(BOB):
            assert await asyncio.wait_for(send("quick-0.example"), HANG) == 200
        assert hosts.received == {"quick-0.example": [b"x" * 200_000]}
        hosts.answer.set()
        assert await asyncio.gather(*slow) == [200] * 30
