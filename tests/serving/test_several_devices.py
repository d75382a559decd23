"""A server with two engine processes, each on half of the CPU: all of it real."""

from __future__ import annotations

import json
import re
import secrets
import signal
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from tests.support.collector import Collector
from tests.support.images import data_uri, gradient, half_mask
from tests.support.server import QUICK, Server, alike, generated, serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

SOON = 120.0  # seconds that a busy machine may take to start an engine
STALL = "10"  # seconds until an engine that says nothing is replaced
IMAGE = data_uri(gradient(192, 192, seed=3))
MIXED: list[dict[str, Any]] = [
    {},
    {"scheduler": "euler_a", "num_inference_steps": 9},
    {"width": 128, "height": 192, "guidance_scale": 1.0},
    {"num_images": 3, "num_inference_steps": 6},
    {"image": IMAGE, "strength": 0.6, "num_inference_steps": 10},
    {"image": IMAGE, "mask_image": data_uri(half_mask(192, 192)), "num_inference_steps": 6},
    {"lora": {"model_id": "outline"}, "num_inference_steps": 8},
    {"controlnet": {"type": "canny", "image": IMAGE, "preprocess": True}},
    {"hires": {"scale": 1.5}, "width": 128, "height": 128},
    {"prompt": "a green square", "negative_prompt": "a circle", "num_inference_steps": 12},
]
REQUESTS = [{**QUICK, **MIXED[i % len(MIXED)], "seed": i} for i in range(20)]
LONGER = [{**QUICK, "num_inference_steps": 60, "seed": i} for i in range(6)]

Pixels = NDArray[np.int16]


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        tmp_path_factory.mktemp("devices"),
        SDBENTO_GPUS="cpu:2",
        SDBENTO_STALL_SECONDS=STALL,
        SDBENTO_OTLP_ENDPOINT=collector.url,
        SDBENTO_TRACE_RATE="0",
        OTEL_BSP_SCHEDULE_DELAY="100",  # milliseconds until spans are sent
    ) as server:
        server.wait_until_ready()
        until(lambda: all_alive(server))
        yield server


def until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.1)


def batches(server: Server) -> Generator[dict[str, Any], None, None]:
    """What /batch tells."""
    with server.client.stream("GET", "/batch") as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def all_alive(server: Server) -> bool:
    with closing(batches(server)) as told:
        return all(device["alive"] for device in next(told)["devices"])


def engines(server: Server) -> list[psutil.Process]:
    """The engine processes, the first device's first."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    found = [one for one in children if any("engine_process" in part for part in one.cmdline())]
    return sorted(found, key=lambda process: process.create_time())


@pytest.fixture(scope="module")
def solo(server: Server) -> list[list[Pixels]]:
    """What each of REQUESTS makes alone."""
    return [generated(server, **fields) for fields in REQUESTS]


@pytest.fixture(scope="module")
def longer_solo(server: Server) -> list[list[Pixels]]:
    return [generated(server, **fields) for fields in LONGER]


def made_together(
    server: Server, requests: list[dict[str, Any]], meanwhile: Callable[[], None] = lambda: None
) -> list[list[Pixels]]:
    with ThreadPoolExecutor(len(requests)) as clients:
        answers: list[Future[list[Pixels]]] = [
            clients.submit(generated, server, **fields) for fields in requests
        ]
        meanwhile()
        return [answer.result() for answer in answers]


def assert_equal(made: list[list[Pixels]], expected: list[list[Pixels]]) -> None:
    for images, others in zip(made, expected, strict=True):
        assert len(images) == len(others)
        assert all(alike(one, other) for one, other in zip(images, others, strict=True))


def wait_until_both_work(server: Server) -> None:
    """Until images are under way on both devices."""
    for told in batches(server):
        if len({lane["device"] for lane in told["lanes"]}) == 2:
            return


def test_requests_share_the_devices_and_each_image_equals_its_solo_run(
    server: Server, solo: list[list[Pixels]]
) -> None:
    made = made_together(server, REQUESTS, lambda: wait_until_both_work(server))
    assert_equal(made, solo)
    resident = re.compile("^sdbento_resident_models [2-9]", re.MULTILINE)  # on both together
    until(lambda: resident.search(server.client.get("/metrics").text))
    (shapes,) = [m for m in server.client.get("/models").json()["models"] if m["default"]]
    assert shapes["devices"] == [0, 1]


def test_a_call_of_the_web_ui_is_made_with_previews_for_who_looks(server: Server) -> None:
    call = {"prompt": "a red circle", "steps": 150, "width": 192, "height": 192, "batch_size": 2}
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(server.client.post, "/sdapi/v1/txt2img", json=call)

        def is_shown() -> bool:
            progress = server.client.get("/sdapi/v1/progress").json()
            return answer.done() or progress["current_image"] is not None

        until(is_shown)
        assert not answer.done()
        server.client.post("/sdapi/v1/interrupt")
        assert answer.result().status_code == 200


def test_a_cancelled_request_is_traced_as_far_as_it_came(
    server: Server, collector: Collector
) -> None:
    trace = secrets.token_hex(16)
    headers = {"traceparent": f"00-{trace}-00000000000000aa-01"}
    long = {**QUICK, "num_images": 2, "num_inference_steps": 150, "guidance_scale": 5.0}
    with server.client.stream("POST", "/generate_stream", json=long, headers=headers) as events:
        next(text for text in events.iter_lines() if '"step": 140' in text)
    names = [span.name for span in collector.trace(trace, until="POST /generate_stream")]
    assert names[-5:] == ["resolve", "load", "queue", "prepare", "steps"]


def test_an_engine_that_is_killed_ends_nobodys_request(
    server: Server, longer_solo: list[list[Pixels]]
) -> None:
    victim = engines(server)[0]

    def kill() -> None:
        wait_until_both_work(server)
        victim.kill()

    assert_equal(made_together(server, LONGER, kill), longer_solo)
    until(lambda: len(engines(server)) == 2 and all_alive(server))
    assert victim.pid not in [one.pid for one in engines(server)]
    assert server.client.get("/readyz").status_code == 200


def test_an_engine_that_is_frozen_is_replaced(
    server: Server, longer_solo: list[list[Pixels]]
) -> None:
    victim = engines(server)[0]

    def freeze() -> None:
        wait_until_both_work(server)
        victim.send_signal(signal.SIGSTOP)

    assert_equal(made_together(server, LONGER, freeze), longer_solo)
    until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)
    until(lambda: all_alive(server))


def test_without_any_engine_the_server_is_not_alive_until_one_is_back(
    server: Server, solo: list[list[Pixels]]
) -> None:
    for engine in engines(server):
        engine.kill()
    until(lambda: server.client.get("/livez").status_code != 200)
    until(lambda: server.client.get("/readyz").status_code == 200)
    assert_equal([generated(server, **REQUESTS[0])], solo[:1])


def test_the_engines_end_with_the_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("end")
    with serving(folder, SDBENTO_GPUS="cpu:2") as server:
        server.wait_until_ready()
        family = engines(server)
        assert len(family) == 2
        server.kill_supervisor()
        _, alive = psutil.wait_procs(family, timeout=SOON)
        assert not alive
