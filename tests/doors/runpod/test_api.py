"""The job routes as RunPod's clients meet them: a real `bentoml serve` on `shapes`, over HTTP."""

from __future__ import annotations

import base64
import itertools
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import runpod
import uvicorn
from PIL import Image
from runpod.endpoint.asyncio.asyncio_runner import Endpoint as AsyncioEndpoint
from runpod.http_client import AsyncClientSession

from sdbento.app import App
from sdbento.doors.http.guard import Guard
from sdbento.doors.http.routing import mounted
from sdbento.doors.runpod import api, lifespan
from sdbento.jobs.store.job_store import JobStore
from sdbento.jobs.table import Job
from sdbento.settings import Settings
from tests.support import seed_example
from tests.support.fakes import FakeRunner
from tests.support.listener import Listener
from tests.support.postgres import new_database
from tests.support.server import (
    QUICK,
    Server,
    alike,
    assert_error,
    free_port,
    generated,
    pixels,
    serving,
)

LONG = {**QUICK, "num_inference_steps": 150, "num_images": 16}
SOON = 60.0


def submitted(server: Server, path: str = "/run", **body: Any) -> str:
    response = server.client.post(path, json={"input": QUICK} | body)
    assert response.status_code == 200, response.text
    assert response.json()["status"] == "IN_QUEUE"
    return str(response.json()["id"])


def ended(server: Server, job_id: str) -> dict[str, Any]:
    give_up = time.monotonic() + SOON
    while time.monotonic() < give_up:
        answer: dict[str, Any] = server.client.get(f"/status/{job_id}").json()
        if answer["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
            return answer
        time.sleep(0.02)
    raise AssertionError(f"job {job_id} did not end")


def until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def health(server: Server) -> dict[str, dict[str, int]]:
    answer: dict[str, dict[str, int]] = server.client.get("/v2/any/health").json()
    return answer


# Jobs


@pytest.mark.parametrize("prefix", ["", "/v2/abc123"])
def test_a_job_is_run_in_the_background(server: Server, prefix: str) -> None:
    headers = {"Authorization": "Bearer whatever"}
    response = server.client.post(f"{prefix}/run", json={"input": QUICK}, headers=headers)
    assert set(response.json()) == {"id", "status"}
    job_id = response.json()["id"]
    ended(server, job_id)
    answer = server.client.get(f"{prefix}/status/{job_id}", headers=headers).json()
    assert set(answer) == {"id", "status", "delayTime", "executionTime", "output"}
    assert answer["status"] == "COMPLETED"
    assert answer["executionTime"] > 0 <= answer["delayTime"]
    [drawn] = answer["output"]
    assert alike(pixels(base64.b64decode(drawn)), generated(server, **QUICK)[0])


def test_runsync_waits_for_the_result(server: Server) -> None:
    body = {"input": {**QUICK, "num_images": 2, "return": "full"}}
    answer = server.client.post("/v2/abc/runsync", json=body).json()
    assert answer["id"].startswith("sync-")
    assert answer["status"] == "COMPLETED"
    assert answer["output"]["seeds"] == [7, 8]
    assert server.client.get(f"/status/{answer['id']}").json() == answer


def test_a_job_of_worker_sdxl_makes_the_picture_of_generate(server: Server) -> None:
    there = {**QUICK, "width": 128, "height": 128, "scheduler": "K_EULER_ANCESTRAL", "seed": 5}
    theirs = {"image_url": None, "return": "worker-sdxl", "strength": 0.3}
    output = server.client.post("/runsync", json={"input": there | theirs}).json()["output"]
    assert output["image_url"] == output["images"][0]
    assert output["seed"] == 5
    drawn = output["image_url"].removeprefix("data:image/png;base64,")
    ours = generated(server, guidance_scale=7.5, **{**there, "scheduler": "Euler a"})
    assert alike(pixels(base64.b64decode(drawn)), ours[0])


def test_runsync_waits_for_the_requested_time_and_can_be_cancelled(server: Server) -> None:
    started = time.monotonic()
    answer = server.client.post("/runsync?wait=1000", json={"input": LONG}).json()
    assert 1 <= time.monotonic() - started < 10
    assert answer["status"] == "IN_PROGRESS"
    assert "output" not in answer
    cancelled = server.client.post(f"/v2/abc/cancel/{answer['id']}")
    assert cancelled.json() == {"id": answer["id"], "status": "CANCELLED"}
    until(lambda: health(server)["workers"]["idle"] == 1)  # 2400 steps would take longer
    assert ended(server, answer["id"])["status"] == "CANCELLED"


def test_status_sync_waits_for_the_end(server: Server) -> None:
    job_id = submitted(server)
    answer = server.client.get(f"/v2/abc/status-sync/{job_id}?wait=60000").json()
    assert answer["status"] == "COMPLETED"
    assert server.client.post(f"/status-sync/{job_id}").json() == answer
    assert_error(server.client.get("/status-sync/none"), 404, "'none'")


@pytest.mark.parametrize("wait", ["999", "300001", "soon", "", "-1", "9" * 5000, "0000001000999"])
def test_a_wait_out_of_bounds_is_refused(server: Server, wait: str) -> None:
    response = server.client.post("/runsync", params={"wait": wait}, json={"input": QUICK})
    assert_error(response, 422, "1000 to 300000", param="wait")


def test_the_wait_for_a_job_ends_when_its_client_leaves(server: Server) -> None:
    job_id = submitted(server, input=LONG)
    path = f"/status-sync/{job_id}"
    with pytest.raises(httpx.ReadTimeout):
        server.client.get(path, params={"wait": "300000"}, timeout=0.5)
    until(lambda: f"the client of {path!r} went away" in server.log.read_text())
    assert server.client.get(f"/status/{job_id}").json()["status"] == "IN_PROGRESS"
    server.client.post(f"/cancel/{job_id}")


def test_a_bad_input_ends_failed(server: Server) -> None:
    job_id = submitted(server, input={"prompt": "x", "stepz": 5})
    answer = ended(server, job_id)
    assert set(answer) == {"id", "status", "delayTime", "executionTime", "error"}
    assert answer["status"] == "FAILED"
    assert "stepz is not a known field" in answer["error"]
    sync = server.client.post("/runsync", json={"input": {"prompt": "x", "model": "no"}}).json()
    assert sync["status"] == "FAILED" and "no" in sync["error"]
    assert_error(server.client.post("/run", json={"prompt": "x"}), 400, '"input"')
    assert_error(server.client.post("/runsync", content=b"{"), 400, "JSON")
    policy = {"input": QUICK, "policy": {"ttl": 1}}
    assert_error(server.client.post("/run", json=policy), 422, "10000", param="policy.ttl")


def test_a_job_that_cannot_be_done_in_time_times_out(server: Server) -> None:
    generated(server, **QUICK)
    large = {**LONG, "width": 512, "height": 512}
    job_id = submitted(server, input=large, policy={"executionTimeout": 5001})
    answer = ended(server, job_id)
    assert answer["status"] == "TIMED_OUT"
    assert "error" in answer


def test_a_failed_job_can_be_retried_and_the_queue_purged(server: Server) -> None:
    job_id = submitted(server, input={"prompt": "x", "model": "unknown-model"})
    assert ended(server, job_id)["status"] == "FAILED"
    retried = server.client.post(f"/v2/abc/retry/{job_id}")
    assert retried.json() == {"id": job_id, "status": "IN_QUEUE"}
    assert ended(server, job_id)["status"] == "FAILED"
    assert health(server)["jobs"]["retried"] >= 1

    ids = [submitted(server, input=LONG) for _ in range(11)]  # 8 of them can run
    until(lambda: health(server)["jobs"]["inProgress"] == 8)
    assert server.client.post("/v2/abc/purge-queue").json() == {"removed": 3, "status": "completed"}
    assert health(server)["workers"]["running"] == 1
    for job_id in ids:
        server.client.post(f"/cancel/{job_id}")
    assert {ended(server, job_id)["status"] for job_id in ids} == {"CANCELLED"}


def test_unknown_jobs_and_wrong_methods_have_the_one_error_shape(server: Server) -> None:
    for ask in (server.client.get, server.client.post):
        assert_error(ask("/v2/abc/status/none"), 404, "'none'")
        assert_error(ask("/stream/none"), 404)
    for path in ("/cancel/none", "/retry/none"):
        assert_error(server.client.post(path), 404)
        assert_error(server.client.get(path), 405)
    assert_error(server.client.get("/v2/abc/run"), 405)
    assert_error(server.client.get("/v2/abc/nothing"), 404)


def test_a_stream_reports_steps_and_ends_with_the_output(server: Server) -> None:
    job_id = submitted(server, input={**QUICK, "preview_every": 2})
    ended(server, job_id)
    answer = server.client.get(f"/v2/abc/stream/{job_id}").json()
    assert answer["status"] == "COMPLETED"
    events = [chunk["output"] for chunk in answer["stream"]]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4]
    assert [event["event"] for event in events][-1] == "done"
    assert events[-1]["output"] == server.client.get(f"/status/{job_id}").json()["output"]
    assert server.client.get(f"/stream/{job_id}").json() == {"status": "COMPLETED", "stream": []}


def test_a_job_continues_when_its_client_leaves_and_posts_to_its_webhook(
    server: Server, listener: Listener
) -> None:
    body = {"input": {**QUICK, "num_inference_steps": 100}, "webhook": listener.url}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/runsync", json=body, timeout=0.3, trust_env=False)
    until(lambda: listener.heard)
    [heard] = listener.heard
    assert heard["status"] == "COMPLETED"
    assert server.client.get(f"/status/{heard['id']}").json() == heard


# RunPod's own client


@pytest.fixture
def sdk(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod, "endpoint_url_base", f"{server.url}/v2")
    monkeypatch.setattr(runpod, "api_key", "rpa_any")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.usefixtures("sdk")
def test_runpods_sdk_works_with_its_host_changed() -> None:
    endpoint = runpod.Endpoint("abc123")
    job = endpoint.run({"input": QUICK})
    assert job.status() in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED")
    [image] = job.output(timeout=60)
    assert endpoint.run_sync(QUICK, timeout=60) == [image]
    events = list(endpoint.run({"input": QUICK}).stream())
    assert [event["event"] for event in events][-1] == "done"
    assert events[-1]["output"] == [image]
    long = endpoint.run({"input": LONG})
    assert long.cancel() == {"id": long.job_id, "status": "CANCELLED"}
    assert long.status() == "CANCELLED"
    assert endpoint.health()["workers"]["ready"] == 1
    assert endpoint.purge_queue() == {"removed": 0, "status": "completed"}


@pytest.mark.usefixtures("sdk")
async def test_runpods_asynchronous_sdk_works_too() -> None:
    async with AsyncClientSession() as session:
        endpoint = AsyncioEndpoint("abc123", session)
        job = await endpoint.run(QUICK)
        assert len(await job.output(timeout=60)) == 1
        assert (await endpoint.health())["jobs"]["completed"] >= 1
        long = await endpoint.run(LONG)
        assert (await long.cancel())["status"] == "CANCELLED"


# The page's program


class QuickRunner(FakeRunner):
    """Makes one pixel whatever the requested size: large images take minutes on a CPU."""

    def measure(self, *_: object, capture: bool = False) -> float:
        return 0.001

    def measure_decode(self, *_: object) -> float:
        return 0.001


@contextmanager
def served_without_bentoml(folder: Path, *, seconds: float = 0.0, **options: Any) -> Iterator[str]:
    """The address of the routes on an App whose runner takes `seconds` a step."""
    settings = Settings(sd_model="shapes", state_dir=folder, **options)
    routes = mounted(api.router, lifespan=lifespan.run_jobs)
    app = routes.state.app = App(settings, QuickRunner(seconds=seconds))
    app.start()
    port = free_port()
    guarded = Guard(routes, lambda: settings, {})
    server = uvicorn.Server(uvicorn.Config(guarded, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        app.close()


def test_the_pages_example_program_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with served_without_bentoml(tmp_path / "state") as url:
        program = "import time\n" + seed_example.PROGRAM.replace(seed_example.HOST, url)
        assert program.count(url) == 2
        command = [sys.executable, "-c", program]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.stdout == "Image generated successfully!\n", ran.stderr
    with Image.open(tmp_path / "generated_image.png") as image:
        assert image.format == "PNG"


def test_one_job_too_many_is_refused_with_a_time_to_retry(tmp_path: Path) -> None:
    with served_without_bentoml(tmp_path / "state", seconds=0.05, max_jobs=1) as url:
        with httpx.Client(base_url=url, trust_env=False) as client:
            job = client.post("/run", json={"input": LONG}).json()
            refused = client.post("/run", json={"input": QUICK})
            assert_error(refused, 429, "SDBENTO_MAX_JOBS")
            assert int(refused.headers["retry-after"]) >= 1
            client.post(f"/cancel/{job['id']}")
            assert client.post("/runsync", json={"input": QUICK}).json()["status"] == "COMPLETED"


def test_a_job_is_cancelled_though_the_client_left_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel = JobStore.cancel

    def slowly(store: JobStore, job_id: str) -> Job | None:
        time.sleep(0.5)
        return cancel(store, job_id)

    monkeypatch.setattr(JobStore, "cancel", slowly)
    with served_without_bentoml(tmp_path / "state", seconds=0.05) as url:
        with httpx.Client(base_url=url, trust_env=False) as client:
            job_id = client.post("/run", json={"input": LONG}).json()["id"]
            until(lambda: client.get("/health").json()["workers"]["running"] == 1)
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"/cancel/{job_id}", timeout=0.1)
            until(lambda: client.get(f"/status/{job_id}").json()["status"] == "CANCELLED")
            until(lambda: client.get("/health").json()["workers"]["running"] == 0)


def test_jobs_can_be_stored_in_postgresql(tmp_path: Path, postgres_server: str) -> None:
    address = new_database(postgres_server).replace("postgresql:", "postgres:")
    with served_without_bentoml(tmp_path / "state", job_store_url=address) as url:
        with httpx.Client(base_url=url, trust_env=False) as client:
            job = client.post("/runsync", json={"input": QUICK}).json()
            assert job["status"] == "COMPLETED"
            assert client.get("/health").json()["jobs"]["completed"] == 1
            assert_error(client.get("/status/%00"), 404)  # PostgreSQL stores no such text
            bad = {"prompt": "x", "scheduler": "\0"}
            assert client.post("/runsync", json={"input": bad}).json()["status"] == "FAILED"
    with served_without_bentoml(tmp_path / "state", job_store_url=address) as url:
        assert httpx.get(f"{url}/status/{job['id']}", trust_env=False).json() == job


def test_job_routes_answer_503_until_jobs_can_be_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifespan, "FIRST_PAUSE", 0.2)
    state = tmp_path / "state"
    state.write_text("a file where a folder should be")
    with served_without_bentoml(state) as url:
        with httpx.Client(base_url=url, trust_env=False) as client:
            assert_error(client.post("/run", json={"input": QUICK}), 503, "jobs cannot be kept")
            assert_error(client.get("/health"), 503)
            assert "jobs cannot be kept" in caplog.text
            state.unlink()
            until(lambda: client.get("/health").status_code == 200)
            assert client.post("/runsync", json={"input": QUICK}).json()["status"] == "COMPLETED"


# Killed


def mixed_input(i: int) -> dict[str, Any]:
    prompt = f"a {['red', 'green', 'blue', 'yellow'][i % 4]} square"
    return {"prompt": prompt, "num_inference_steps": 3 + 3 * (i % 5), "return": "full"}


@pytest.mark.long
@pytest.mark.timeout(240)  # two servers are started, one after the other
def test_jobs_survive_kill_9_and_each_completes_once(tmp_path: Path) -> None:
    random.seed(moment := time.time_ns())
    print(f"random.seed({moment})")
    with serving(tmp_path) as first:
        first.wait_until_ready()
        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(lambda i: submitted(first, input=mixed_input(i)), range(30)))
        give_up = time.monotonic() + random.uniform(0.0, 3.0)
        before: dict[str, dict[str, Any]] = {}
        for job_id in itertools.cycle(ids):
            answer = first.client.get(f"/status/{job_id}").json()
            if answer["status"] == "COMPLETED":
                before[job_id] = answer
            if time.monotonic() > give_up:
                break
        first.kill()
    with serving(tmp_path) as second:
        second.wait_until_ready()
        after = {job_id: ended(second, job_id) for job_id in ids}
        assert {answer["status"] for answer in after.values()} == {"COMPLETED"}
        assert {job_id: after[job_id] for job_id in before} == before
        for answer in [after[ids[0]], after[ids[-1]]]:
            again = generated(second, **answer["output"]["parameters"])[0]
            image = BytesIO(base64.b64decode(answer["output"]["images"][0])).getvalue()
            assert alike(pixels(image), again)
        last = submitted(second, input=mixed_input(4))
        second.kill_supervisor()
    store = JobStore(tmp_path / "state")  # which the other processes have let go of
    assert store.get(last) is not None
    runs = {job_id: job.run for job_id in ids if (job := store.get(job_id)) is not None}
    store.close()
    assert len(runs) == 30
    assert {runs[job_id] for job_id in before} <= {1}
    assert set(runs.values()) <= {1, 2}
    results = {path.name.split(".")[0] for path in (tmp_path / "state" / "results").iterdir()}
    assert results - {last} == set(ids)
