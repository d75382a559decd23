"""What operators see of a real server: its traces at a collector, and its log in JSON."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from httpx import Response

from tests.support.collector import CollectedSpan, Collector
from tests.support.listener import Listener
from tests.support.server import QUICK, Server, serving

KEY = "a-key-that-nobody-may-see"
PROMPT = "a prompt that nobody may see"
SMALL = {**QUICK, "prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 3}
LONG = {**SMALL, "num_inference_steps": 150, "width": 256, "height": 256}
PARTS = ["resolve", "load", "queue", "prepare", "steps", "decode", "encode"]
PATIENCE = 60.0  # seconds


@pytest.fixture(scope="module")
def observed(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        tmp_path_factory.mktemp("observed"),
        SDBENTO_OTLP_ENDPOINT=collector.url,
        OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer%20ours",
        OTEL_BSP_SCHEDULE_DELAY="100",  # milliseconds until spans are sent
        SDBENTO_LOG_FORMAT="json",
        SDBENTO_API_KEY=KEY,
        SDBENTO_ALLOW_PRIVATE_URLS="true",
    ) as server:
        server.wait_until_ready()
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        yield server


def new_trace() -> tuple[str, dict[str, str]]:
    """The id of a trace that begins at a client, and the headers that tell a server of it."""
    trace = secrets.token_hex(16)
    return trace, {"traceparent": f"00-{trace}-00000000000000aa-01", "X-Request-ID": trace}


def named(spans: list[CollectedSpan], name: str) -> CollectedSpan:
    (found,) = (span for span in spans if span.name == name)
    return found


def below(spans: list[CollectedSpan], parent: CollectedSpan) -> list[CollectedSpan]:
    return [span for span in spans if span.parent == parent.id]


def line_of(server: Server, request_id: str, message: str = "request") -> dict[str, Any]:
    """The line of the log about a request, which is written when its answer has been sent."""
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        for line in server.log.read_text().splitlines():
            told: dict[str, Any] = json.loads(line)
            if (told.get("request_id"), told["message"]) == (request_id, message):
                return told
        time.sleep(0.1)
    raise AssertionError(f"no line about {request_id}")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", SMALL),
        ("/txt2img", SMALL),
        ("/generate_stream", SMALL),
        ("/v1/images/generations", {"prompt": PROMPT, "size": "64x64", "num_inference_steps": 3}),
        ("/sdapi/v1/txt2img", {"prompt": PROMPT, "width": 64, "height": 64, "steps": 3}),
    ],
)
def test_each_door_leaves_a_trace_of_all_parts_and_a_line_in_the_log(
    observed: Server, collector: Collector, path: str, body: dict[str, Any]
) -> None:
    trace, headers = new_trace()
    answer = observed.client.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Request-ID"] == trace
    spans = collector.trace(trace, until=f"POST {path}")
    request = named(spans, f"POST {path}")
    assert request.parent == "00000000000000aa"
    assert answer.headers["traceresponse"] == f"00-{trace}-{request.id}-01"
    parts = below(spans, request)
    assert [part.name for part in parts] == PARTS and len(spans) == len(PARTS) + 1
    for part in parts:
        assert request.began <= part.began <= part.ended
    asked = {name: request.attributes[name] for name in ("gen_ai.request.model", "http.route")}
    assert asked == {"gen_ai.request.model": "shapes", "http.route": path}
    assert request.attributes["sdbento.request_id"] == trace
    assert request.attributes["sdbento.outcome"] == "ok"
    assert request.attributes["enduser.id"] == "default"
    steps = named(spans, "steps").attributes
    assert (steps["sdbento.calls"], steps["sdbento.rows_per_call"]) == (3, 2)
    line = line_of(observed, trace)
    assert (line["route"], line["status"], line["outcome"]) == (path, 200, "ok")
    assert (line["key"], line["model"], line["images"]) == ("default", "shapes", 1)
    assert 0 <= line["queued"] <= line["seconds"] and line["trace_id"] == trace


def test_a_job_goes_on_with_the_trace_of_the_request_that_has_queued_it(
    observed: Server, collector: Collector, listener: Listener
) -> None:
    trace, headers = new_trace()
    body = {"input": SMALL, "webhook": listener.url}
    job_id = observed.client.post("/run", json=body, headers=headers).json()["id"]
    spans = collector.trace(trace, until="POST webhook")
    request, job = named(spans, "POST /run"), named(spans, "job")
    assert (job.parent, job.links) == (request.id, (request.id,))
    assert job.attributes["sdbento.job_id"] == job_id
    assert job.attributes["sdbento.outcome"] == "ok"
    assert [part.name for part in below(spans, job)] == PARTS
    post = named(spans, "POST webhook")
    assert (post.parent, post.attributes["http.response.status_code"]) == (request.id, 200)
    ((posted, _),) = listener.posts
    assert posted["traceparent"] == f"00-{trace}-{post.id}-01"
    line = line_of(observed, job_id, "job")
    assert (line["outcome"], line["model"], line["trace_id"]) == ("ok", "shapes", trace)


def refused(server: Server, headers: dict[str, str]) -> Response:
    return server.client.post("/generate", json={**SMALL, "width": 3}, headers=headers)


def without_key(server: Server, headers: dict[str, str]) -> Response:
    return server.client.post("/generate", json=SMALL, headers={**headers, "Authorization": ""})


def with_a_picture_that_is_not_there(server: Server, headers: dict[str, str]) -> Response:
    picture = {"image": "http://127.0.0.1:9/a-place-that-nobody-may-see.png"}
    return server.client.post("/generate", json={**SMALL, **picture}, headers=headers)


@pytest.mark.parametrize(
    ("ask", "status", "outcome", "error", "parts"),
    [
        (refused, 422, "invalid", "invalid_parameter", []),
        (without_key, 401, "unauthorized", "unauthorized", []),
        (with_a_picture_that_is_not_there, 422, "invalid", "invalid_parameter", ["resolve"]),
    ],
)
def test_a_refused_request_is_told_with_its_error(
    observed: Server,
    collector: Collector,
    ask: Callable[[Server, dict[str, str]], Response],
    status: int,
    outcome: str,
    error: str,
    parts: list[str],
) -> None:
    trace, headers = new_trace()
    answer = ask(observed, headers)
    assert (answer.status_code, answer.headers["X-Request-ID"]) == (status, trace)
    spans = collector.trace(trace, until="POST /generate")
    request = named(spans, "POST /generate")
    assert request.attributes["error.type"] == error
    assert request.attributes["sdbento.outcome"] == outcome
    assert [part.name for part in below(spans, request)] == parts
    line = line_of(observed, trace)
    assert (line["status"], line["outcome"], line["error"]) == (status, outcome, error)


def test_a_cancelled_request_is_told_as_far_as_it_came(
    observed: Server, collector: Collector
) -> None:
    trace, headers = new_trace()
    with observed.client.stream("POST", "/generate_stream", json=LONG, headers=headers) as events:
        next(text for text in events.iter_lines() if text == "event: step")
    spans = collector.trace(trace, until="POST /generate_stream")
    request = named(spans, "POST /generate_stream")
    assert request.attributes["sdbento.outcome"] == "cancelled"
    assert [part.name for part in below(spans, request)] == PARTS[:5]
    assert named(spans, "steps").attributes["sdbento.calls"] < 150
    assert line_of(observed, trace)["outcome"] == "cancelled"


def test_a_request_that_is_not_sampled_sends_no_spans(
    observed: Server, collector: Collector
) -> None:
    unseen, headers = new_trace()
    headers["traceparent"] = headers["traceparent"][:-1] + "0"
    answer = observed.client.post("/generate", json=SMALL, headers=headers)
    assert answer.status_code == 200 and "traceresponse" not in answer.headers
    later, headers = new_trace()
    observed.client.post("/generate", json=SMALL, headers=headers)
    collector.trace(later, until="POST /generate")  # spans are sent in the order of their ends
    assert unseen not in collector.traces


def test_neither_logs_nor_traces_have_prompts_keys_or_places_of_pictures(
    observed: Server, collector: Collector
) -> None:
    _, headers = new_trace()
    body = {"prompt": PROMPT, "size": "64x64", "num_inference_steps": 1, "response_format": "url"}
    made = observed.client.post("/v1/images/generations", json=body, headers=headers).json()
    url = httpx.URL(made["data"][0]["url"])
    seen, headers = new_trace()
    assert observed.client.get(url.path, headers=headers).status_code == 200
    collector.trace(seen, until="GET /v1/images/files/{name}")
    assert line_of(observed, seen)["route"] == "/v1/images/files/{name}"
    assert collector.senders == {"Bearer ours"}
    told = b"".join(collector.bodies).decode("latin-1") + observed.log.read_text()
    for secret in (PROMPT, KEY, url.path.rpartition("/")[2], "a-place-that-nobody-may-see"):
        assert secret not in told
    for line in observed.log.read_text().splitlines():
        assert {"time", "level", "logger", "message"} <= json.loads(line).keys()


async def test_stats_tell_what_runs_and_no_more_than_the_batch(observed: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=observed.url, headers=headers, timeout=110) as client:
        work = asyncio.create_task(client.post("/generate", json=LONG))
        try:
            stats = (await client.get("/stats")).json()
            while not stats["images"]["running"]:
                stats = (await client.get("/stats")).json()
        finally:
            work.cancel()
        assert stats["requests"] == {"preparing": 0, "waiting": 0, "running": 1}
        assert stats["images"] == {"waiting": 0, "running": 1}
        (lane,) = stats["lanes"]
        assert (lane["model"], lane["width"], lane["images"]) == ("shapes", 256, 1)
        assert stats["ready"] and stats["uptime"] > 0 and "eta" in stats
        assert stats["memory"]["process"] > 0 and stats["jobs"]["IN_QUEUE"] == 0
        assert PROMPT not in json.dumps(stats)
        assert (await client.get("/stats", headers={"Authorization": ""})).status_code == 401
