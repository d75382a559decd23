"""A GPU that hangs, and one that fails: clients are told, the process is replaced, and no job is
lost."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.support.device_errors import FATAL_SEED, HANGING_SEED
from tests.support.server import QUICK, Server, assert_error, generated, post, serving

SOON = 60.0
STALL = 2.0  # seconds after which a step hangs here
LONG = {**QUICK, "num_inference_steps": 150}


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def worker_of(server: Server) -> psutil.Process:
    """The process that serves, which the supervisor has started."""
    (worker,) = psutil.Process(server.process.pid).children()
    return worker


def status_of(server: Server, job_id: str) -> str:
    return str(server.client.get(f"/status/{job_id}").json()["status"])


def running_job(server: Server) -> str:
    job_id = str(server.client.post("/run", json={"input": LONG}).json()["id"])
    until(lambda: status_of(server, job_id) == "IN_PROGRESS")
    return job_id


@pytest.mark.long
@pytest.mark.timeout(240)  # two processes are started, one after the other
def test_a_process_is_replaced_whose_gpu_hangs_or_fails(tmp_path: Path) -> None:
    target = "tests.support.faulty_gpu:StableDiffusion"
    with serving(tmp_path, target=target, SDBENTO_STALL_SECONDS=str(STALL)) as server:
        server.wait_until_ready()
        generated(server, **QUICK)
        a_process_that_was_stopped_goes_on(server)
        a_step_hangs(server, tmp_path / "state" / "hang")
        the_gpu_fails(server)


def a_process_that_was_stopped_goes_on(server: Server) -> None:
    job_id, worker = running_job(server), worker_of(server)
    time.sleep(0.5)  # it has 150 steps
    worker.send_signal(signal.SIGSTOP)
    time.sleep(2 * STALL)
    worker.send_signal(signal.SIGCONT)
    until(lambda: status_of(server, job_id) == "COMPLETED")
    assert server.client.get("/livez").status_code == 200


def a_step_hangs(server: Server, trigger: Path) -> None:
    trigger.touch()
    job_id, worker = running_job(server), worker_of(server)
    with ThreadPoolExecutor() as pool:
        stuck = pool.submit(post, server, **{**LONG, "seed": HANGING_SEED})
        beside = pool.submit(post, server, **LONG)
        for answer in (stuck.result(), beside.result()):
            assert_error(answer, 503, "the server is being restarted")
            assert int(answer.headers["retry-after"]) > 0
    assert_error(server.client.get("/livez"), 503)
    assert_error(post(server, **QUICK), 503, "the server is being restarted")
    assert status_of(server, job_id) == "IN_PROGRESS"

    until(lambda: not worker.is_running())
    server.wait_until_ready()
    assert worker_of(server).pid != worker.pid
    generated(server, **{**QUICK, "seed": HANGING_SEED})
    until(lambda: status_of(server, job_id) == "COMPLETED")
    log = server.log.read_text()
    assert "step of shapes hangs" in log
    assert re.search(r'^  File ".+", line \d+, in launch$', log, re.MULTILINE)  # where


def the_gpu_fails(server: Server) -> None:
    assert server.client.get("/livez").status_code == 200
    assert server.client.get("/ping").status_code == 200
    assert_error(post(server, **{**QUICK, "seed": FATAL_SEED}), 500, "the device failed")

    assert_error(server.client.get("/livez"), 503)
    assert_error(server.client.get("/readyz"), 503)
    assert server.client.get("/ping").status_code == 503
    workers = server.client.get("/health").json()["workers"]
    assert (workers["unhealthy"], workers["ready"], workers["initializing"]) == (1, 0, 0)
    refused = post(server, **QUICK)
    assert_error(refused, 503, "the server is being restarted")
    assert int(refused.headers["retry-after"]) > 0
    log = server.log.read_text()
    assert "the GPU has failed: this process must be replaced" in log
    assert log.count("this process ends in") == 2
