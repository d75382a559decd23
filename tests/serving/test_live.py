"""A real server whose batch is watched: by its clients, and while it stops."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.serving.test_neighbours import client_at
from tests.support.server import QUICK, Server, serving

LONG = {**QUICK, "num_inference_steps": 150, "width": 192, "height": 192}
INK = {"model_id": "outline", "weight": 0.7}
SOON = 60.0


@asynccontextmanager
async def watching(
    client: httpx.AsyncClient, **headers: str
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The snapshots that `client` is sent."""

    async def snapshots() -> AsyncIterator[dict[str, Any]]:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))

    async with client.stream("GET", "/batch", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield snapshots()


async def seen_with(snapshots: AsyncIterator[dict[str, Any]], num_requests: int) -> Any:
    """The first snapshot in which so many requests take part in UNet calls."""
    async with asyncio.timeout(SOON):
        async for one in snapshots:
            assert one["event"] == "batch"
            images = [image for lane in one["lanes"] for image in lane["images"]]
            if len({image["request"] for image in images if image["rows"]}) == num_requests:
                return one
    raise AssertionError("the stream has ended")


async def test_each_sees_his_own_by_name_and_others_as_anothers(server: Server) -> None:
    async with client_at(server, "127.0.0.1") as ann, client_at(server, "127.0.0.2") as bob:
        work = [
            asyncio.create_task(
                ann.post("/generate", json={**LONG, "prompt": "ann's wish", "lora": [INK]})
            ),
            asyncio.create_task(
                bob.post("/generate", json={**LONG, "prompt": "bob's", "scheduler": "Euler a"})
            ),
        ]
        try:
            async with watching(ann) as to_ann, watching(bob) as to_bob:
                anns, bobs = await seen_with(to_ann, 2), await seen_with(to_bob, 2)
        finally:
            for one in work:
                one.cancel()
            await asyncio.gather(*work, return_exceptions=True)
    assert "bob's" not in json.dumps(anns)
    assert not [secret for secret in ("ann's", "outline") if secret in json.dumps(bobs)]
    named = {one["prompt"]: one for one in anns["requests"]}
    assert (named["ann's wish"]["yours"], named["ann's wish"]["loras"]) == (True, [INK["model_id"]])
    assert (named[None]["yours"], named[None]["sampler"]) == (False, "Euler a")
    named = {one["prompt"]: one for one in bobs["requests"]}
    assert (named[None]["loras"], named[None]["num_loras"]) == ([], 1)
    (lane,) = bobs["lanes"]
    assert (lane["model"], lane["width"], lane["height"], lane["rows"]) == ("shapes", 192, 192, 4)
    memory = {model["name"]: model["memory_gb"] for model in bobs["models"]}
    assert memory["shapes"] > 0  # other tests may have left more
    assert bobs["recent"]["rows"] > 0 and bobs["recent"]["seconds"] > 0
    assert bobs["queue"]["requests"] == 2


async def test_clients_of_an_unknown_proxy_see_nobodys_prompts(server: Server) -> None:
    async with client_at(server, "127.0.0.1") as proxy:
        work = asyncio.create_task(proxy.post("/generate", json={**LONG, "prompt": "a wish"}))
        try:
            async with watching(proxy, **{"X-Forwarded-For": "203.0.113.7"}) as snapshots:
                seen = await seen_with(snapshots, 1)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
    assert "a wish" not in json.dumps(seen)
    assert not any(one["yours"] for one in seen["requests"])


async def test_one_who_comes_is_told_at_once(server: Server) -> None:
    async with client_at(server, "127.0.0.3") as client, watching(client) as snapshots:
        one = await anext(snapshots)
    assert set(one) >= {"number", "time", "calls", "queue", "lanes", "requests", "models"}


def test_an_open_stream_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.wait_until_ready()
        begun = threading.Event()
        lines: list[str] = []

        def watch() -> None:
            with server.client.stream("GET", "/batch") as response:
                for line in response.iter_lines():
                    lines.append(line)
                    begun.set()

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert begun.wait(SOON)
        server.process.terminate()
        watcher.join(10)  # the stream ends as it should, which httpx would raise about otherwise
        assert not watcher.is_alive()
        server.process.wait(15)
        assert "server is" not in "".join(lines) and lines[0] == "event: batch"
