"""What /metrics shows of a real server: each kind of request, exactly as often as it was made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from tests.support.images import data_uri, gradient
from tests.support.metrics import Counted, scraped
from tests.support.server import Server, post

SMALL: dict[str, Any] = {
    "prompt": "a red circle",
    "width": 64,
    "height": 64,
    "num_inference_steps": 2,
    "seed": 1,
}
ENDLESS = {**SMALL, "width": 256, "height": 256, "num_inference_steps": 150, "num_images": 16}
SOON = 60.0


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def requests(route: str, outcome: str = "ok", model: str = "shapes") -> str:
    return f"sdbento_requests_total{{model={model},outcome={outcome},route={route}}}"


def requests_since(server: Server, before: Counted) -> dict[str, float]:
    grown = scraped(server).since(before)
    return {name: more for name, more in grown.items() if name.startswith("sdbento_requests")}


def test_every_door_counts_its_requests_by_route_model_and_outcome(server: Server) -> None:
    before = scraped(server)
    ask = server.client.post
    post(server, **SMALL, num_images=2)
    post(server, "/txt2img/", **SMALL)
    post(server, "/generate_stream", **SMALL)
    post(server, "/img2img", **SMALL, image=data_uri(gradient()))
    ask("/v1/images/generations", json=SMALL)
    ask("/sdapi/v1/txt2img", json={"prompt": "a red circle", "steps": 2, "width": 64, "height": 64})
    ask("/v2/any/runsync", json={"input": SMALL})
    ask("/sdapi/v1/txt2img", json={"prompt": "a red circle", "steps": 0})
    ask("/runsync", content=b"[")
    post(server, **SMALL, model="no-such-model")
    post(server, **SMALL, timeout=0.001)
    assert server.client.get("/generate").status_code == 405
    assert server.client.get("/models").status_code == 200
    assert requests_since(server, before) == {
        requests("/generate"): 1,
        requests("/txt2img"): 1,
        requests("/generate_stream"): 1,
        requests("/img2img"): 1,
        requests("/v1/images/generations"): 1,
        requests("/sdapi/v1/txt2img"): 1,
        requests("/runsync"): 1,
        requests("/sdapi/v1/txt2img", "invalid", "none"): 1,
        requests("/runsync", "invalid", "none"): 1,
        requests("/generate", "not_found", "none"): 1,
        requests("/generate", "timeout", "none"): 1,
    }
    grown = scraped(server).since(before)
    assert grown["sdbento_images_total{model=shapes,task=txt2img}"] == 7
    assert grown["sdbento_images_total{model=shapes,task=img2img}"] == 1
    assert grown["sdbento_request_seconds_count"] == 11
    assert grown["sdbento_queue_seconds_count"] == 7


def test_who_leaves_and_who_interrupts_is_counted(server: Server) -> None:
    before = scraped(server)
    with server.client.stream("POST", "/generate_stream", json=ENDLESS) as response:
        lines = response.iter_lines()
        while "event: step" not in next(lines):
            pass
    call = {"prompt": "a red circle", "steps": 150, "batch_size": 16}
    calling = threading.Thread(
        target=server.client.post, args=["/sdapi/v1/txt2img"], kwargs={"json": call}
    )
    calling.start()
    until(lambda: server.client.get("/sdapi/v1/progress").json()["state"]["job_count"] > 0)
    server.client.post("/sdapi/v1/interrupt")
    calling.join()
    until(lambda: sum(requests_since(server, before).values()) == 2)
    grown = scraped(server).since(before)
    assert grown["sdbento_cancelled_total{reason=disconnect}"] == 1
    assert grown["sdbento_cancelled_total{reason=interrupt}"] == 1
    assert grown[requests("/generate_stream", "cancelled")] == 1


def test_a_scrape_does_not_grow_with_what_clients_ask_for(server: Server) -> None:
    post(server, **SMALL, model="made-up")
    server.client.post("/run-made-up")
    before = scraped(server).series
    for i in range(40):
        server.client.post(f"/v2/{i}/run/{i}", json={})
        server.client.post(f"/generate/{i}", json=SMALL)
        server.client.request(f"METHOD{i}", "/generate")
        post(server, **SMALL, model=f"made-up-{i}")
        post(server, f"/sdapi/v1/txt2img?{i}", prompt=f"{i}", steps=0)
    after = scraped(server).series
    ours = {key for key in after if key[0].startswith("sdbento")}
    assert ours <= before.keys()
    assert not any("made" in value for _, labels in ours for _, value in labels)
