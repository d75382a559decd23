"""A real server without keys, and two clients: one floods it, the other wants a single image."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from tests.support.server import QUICK, Server, assert_error

HEAVY = {**QUICK, "num_inference_steps": 150, "num_images": 4, "timeout": 600}
PLACES = 104  # MAX_QUEUE_SIZE and MAX_BATCH_SIZE


@asynccontextmanager
async def client_at(server: Server, address: str) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(
        local_address=address, limits=httpx.Limits(max_connections=None)
    )
    async with httpx.AsyncClient(
        base_url=server.url, transport=transport, timeout=110, trust_env=False
    ) as client:
        yield client


async def refused(answers: list[asyncio.Task[httpx.Response]]) -> httpx.Response:
    """The first answer of a flood: all that are accepted take far longer than the others."""
    done, _ = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
    return done.pop().result()


async def test_a_flood_from_one_address_shuts_nobody_else_out(server: Server) -> None:
    async with client_at(server, "127.0.0.1") as greedy, client_at(server, "127.0.0.2") as modest:
        flood = [
            asyncio.create_task(greedy.post("/generate", json=HEAVY)) for _ in range(PLACES + 1)
        ]
        try:
            answer = await refused(flood)
            assert_error(answer, 429, "MAX_QUEUE_SIZE=100")
            invented = {"X-Forwarded-For": "203.0.113.7"}
            answer = await greedy.post("/generate", json=QUICK, headers=invented)
            assert_error(answer, 429, "MAX_QUEUE_SIZE=100")
            assert int(answer.headers["retry-after"]) > 1  # 600 steps of an image take longer
            assert (await modest.post("/generate", json=QUICK)).status_code == 200
            assert sum(one.done() for one in flood) <= 2
        finally:
            for one in flood:
                one.cancel()
            await asyncio.gather(*flood, return_exceptions=True)


async def test_nobody_purges_the_jobs_of_another_address(server: Server) -> None:
    long = {"input": {**QUICK, "num_inference_steps": 150, "num_images": 16}}
    async with client_at(server, "127.0.0.1") as one, client_at(server, "127.0.0.2") as other:
        ids = [(await one.post("/run", json=long)).json()["id"] for _ in range(14)]
        assert (await other.post("/purge-queue")).json()["removed"] == 0
        assert (await one.post("/purge-queue")).json()["removed"] > 0
        for job_id in ids:
            await other.post(f"/cancel/{job_id}")  # whoever knows the id may
