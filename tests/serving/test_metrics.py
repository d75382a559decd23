"""What /metrics shows of a real server: each kind of request, exactly as often as it was made."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from sdbento.metrics.definitions import METRICS
from tests.repository.test_monitoring import dashboard_queries, documented_queries
from tests.support.images import data_uri, gradient, half_mask
from tests.support.listener import listening
from tests.support.metrics import Counted, scraped
from tests.support.prometheus import Prometheus, prometheus
from tests.support.s3 import SECRET, storing
from tests.support.server import ROOT, Server, post, serving

SMALL: dict[str, Any] = {
    "prompt": "a red circle",
    "width": 64,
    "height": 64,
    "num_inference_steps": 2,
    "seed": 1,
}
ENDLESS = {**SMALL, "width": 256, "height": 256, "num_inference_steps": 150, "num_images": 16}
KEY = "a-key-of-the-tests"
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
    seen = requests_since(server, before)
    # So little time ends before the model is known, or just after.
    late = [requests("/generate", "timeout", model) for model in ("none", "shapes")]
    assert [seen.pop(name) for name in late if name in seen] == [1]
    assert seen == {
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


# By a real Prometheus


class Monitored:
    """A server with a key and two models, which takes two requests at a time and makes one image at
    a time; and a Prometheus that scrapes it. `ask`: a client with the key."""

    def __init__(self, server: Server, prometheus: Prometheus) -> None:
        self.prometheus = prometheus
        self.url = server.url
        self.ask = httpx.Client(
            base_url=server.url,
            timeout=120.0,
            trust_env=False,
            headers={"Authorization": f"Bearer {KEY}"},
        )

    def total(self, metric: str) -> float:
        """The sum of its series, as Prometheus has them."""
        found = self.prometheus.query(f"sum({metric})")
        return float(found[0]["value"][1]) if found else 0.0

    def by(self, label: str, metric: str) -> dict[str, float]:
        """What is not zero."""
        found = self.prometheus.query(f"sum by ({label}) ({metric}) > 0")
        return {one["metric"].get(label, ""): float(one["value"][1]) for one in found}

    def is_idle(self) -> bool:
        counted = Counted(self.ask.get("/metrics").text)
        return counted.value("sdbento_active_images") == 0


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    folder = tmp_path_factory.mktemp("monitored")
    shutil.copytree(ROOT / "sdbento" / "bundled" / "shapes", folder / "models" / "second")
    settings: dict[str, Any] = {
        "SD_MODEL": "second",
        "SDBENTO_MODELS_DIR": str(folder / "models"),
        "SDBENTO_MEMORY_GB": "0.2",  # what the catalogue says that `shapes` needs alone
        "SDBENTO_ALLOW_PRIVATE_URLS": "true",
        "SDBENTO_API_KEY": KEY,
        "MAX_BATCH_SIZE": "1",
        "MAX_QUEUE_SIZE": "1",
    }
    with serving(folder, **settings) as server:
        server.wait_until_ready()
        with prometheus(folder, server.url.removeprefix("http://"), KEY) as running:
            monitored = Monitored(server, running)
            yield monitored
            monitored.ask.close()


def make_images(ask: httpx.Client) -> None:
    """Ten, one after another, by every door, in two steps each."""
    image, mask = data_uri(gradient()), data_uri(half_mask())
    from_image = {**SMALL, "strength": 1.0, "image": image}
    a1111 = {"prompt": "a red circle", "steps": 2, "width": 64, "height": 64}
    for path, body in [
        ("/generate", {**SMALL, "lora": {"model_id": "outline"}, "model": "shapes"}),
        ("/txt2img", SMALL),
        ("/generate_stream", SMALL),
        ("/img2img", from_image),
        ("/inpaint", {**from_image, "mask_image": mask}),
        ("/v1/images/generations", SMALL),
        ("/sdapi/v1/txt2img", a1111),
    ]:
        assert ask.post(path, json=body).status_code == 200
    with listening() as host, storing() as store:
        host.statuses = [500]
        bucket = {"accessId": "a", "accessSecret": SECRET, "bucketName": "b"}
        bucket["endpointUrl"] = store.url
        jobs: list[tuple[dict[str, Any], str]] = [
            ({"webhook": host.url}, "COMPLETED"),
            ({"s3Config": bucket}, "COMPLETED"),
            ({"s3Config": bucket | {"accessSecret": "wrong"}}, "FAILED"),
        ]
        for around, status in jobs:
            job = ask.post("/runsync", json={"input": SMALL, **around}).json()
            assert job["status"] == status
        until(lambda: len(host.heard) == 2)  # it is posted again after ten seconds


def make_others(monitored: Monitored) -> None:
    """Nine that make no image: refused, late, abandoned or cancelled."""
    ask = monitored.ask
    for path, body, status in [
        ("/generate", SMALL | {"model": "none-such"}, 404),
        ("/generate", SMALL | {"width": 65}, 422),
        ("/inpaint", SMALL, 422),
        ("/txt2img", SMALL | {"timeout": 0.001}, 504),
    ]:
        assert ask.post(path, json=body).status_code == status
    assert httpx.post(f"{monitored.url}/run", json={}, trust_env=False).status_code == 401
    with ExitStack() as streams:
        filling = [
            streams.enter_context(ask.stream("POST", "/generate_stream", json=ENDLESS)).iter_lines()
            for _ in range(2)
        ]
        assert [*map(next, filling)] == ["event: queued"] * 2
        assert ask.post("/v1/images/generations", json=SMALL).status_code == 429
    until(monitored.is_idle)
    job = ask.post("/run", json={"input": ENDLESS}).json()["id"]
    until(lambda: ask.get(f"/status/{job}").json()["status"] == "IN_PROGRESS")
    ask.post(f"/cancel/{job}")


@pytest.mark.long
@pytest.mark.timeout(400)
def test_prometheus_sees_what_was_done_exactly_as_often(monitored: Monitored) -> None:
    by, total = monitored.by, monitored.total
    make_images(monitored.ask)
    until(lambda: total("sdbento_requests_total") == 10)
    until(lambda: total("sdbento_webhooks_total") == 2)
    assert by("model", "sdbento_images_total") == {"shapes": 1, "second": 9}
    assert by("task", "sdbento_images_total") == {"txt2img": 8, "img2img": 1, "inpaint": 1}
    assert by("model", "sdbento_step_seconds_count") == {"shapes": 2, "second": 18}
    assert by("size", "sdbento_step_seconds_count") == {"256": 20}
    assert total("sdbento_step_rows_count") == 20
    assert by("kind", "sdbento_rows_total") == {"useful": 40}
    assert total("sdbento_step_rows_sum") == 40
    assert total("sdbento_decode_seconds_count") == 10
    assert total("sdbento_queue_seconds_count") == 10
    assert by("outcome", "sdbento_model_loads_total") == {"ok": 3}  # second, shapes, second
    assert total("sdbento_model_load_seconds_count") == 3
    assert total("sdbento_evictions_total") == 1
    assert total("sdbento_resident_models") == 2
    assert by("kind", "sdbento_memory_bytes")["budget"] == 0.2e9
    assert total("sdbento_lora_loads_total") == 1
    assert by("outcome", "sdbento_webhooks_total") == {"refused": 1, "accepted": 1}
    assert by("outcome", "sdbento_uploads_total") == {"ok": 1, "failed": 1}
    assert by("result", "sdbento_prompt_cache_total").keys() == {"hit", "miss"}

    make_others(monitored)
    until(lambda: total("sdbento_requests_total") == 19)
    until(lambda: total('sdbento_jobs{status!="IN_PROGRESS"}') == 4)
    assert by("outcome", "sdbento_requests_total") == {
        "ok": 9,
        "invalid": 3,  # the credentials of the bucket, too
        "not_found": 1,
        "timeout": 1,
        "unauthorized": 1,
        "overloaded": 1,
        "cancelled": 3,
    }
    assert by("route", "sdbento_requests_total") == {
        "/generate": 3,
        "/txt2img": 2,
        "/generate_stream": 3,
        "/img2img": 1,
        "/inpaint": 2,
        "/v1/images/generations": 2,
        "/sdapi/v1/txt2img": 1,
        "/runsync": 3,
        "/run": 2,
    }
    assert total("sdbento_request_seconds_count") == 19
    assert by("reason", "sdbento_cancelled_total") == {"disconnect": 2, "cancel": 1}
    assert by("status", "sdbento_jobs") == {"COMPLETED": 2, "FAILED": 1, "CANCELLED": 1}
    until(lambda: total("sdbento_queue_depth") == total("sdbento_active_images") == 0)
    assert total("sdbento_images_total") == 10
    assert total("sdbento_out_of_memory_total") == 0


@pytest.mark.long
def test_every_query_of_the_dashboard_and_the_documents_has_an_answer(monitored: Monitored) -> None:
    known = monitored.prometheus.http.get("/api/v1/label/__name__/values").json()["data"]
    for one in METRICS.values():
        assert (f"{one.name}_bucket" if one.kind == "histogram" else one.name) in known
    queries = [*dashboard_queries(), *documented_queries()]
    until(lambda: all(map(monitored.prometheus.query, queries)))  # rates take two scrapes
