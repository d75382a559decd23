"""A GPU that hangs in a step: clients are told, the process is replaced, and no job is lost."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.support.device_errors import HANGING_SEED
from tests.support.server import QUICK, Server, assert_error, generated, post, serving

SOON = 60.0
STALL = 3.0  # seconds after which a step hangs here


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


@pytest.mark.timeout(240)  # two processes are started, one after the other
def test_a_process_that_hangs_is_replaced_and_one_that_was_stopped_is_not(tmp_path: Path) -> None:
    target = "tests.support.hanging_gpu:StableDiffusion"
    long = {**QUICK, "num_inference_steps": 150}
    with (
        ThreadPoolExecutor(3) as pool,
        serving(tmp_path, target=target, SDBENTO_STALL_SECONDS=str(STALL)) as server,
    ):
        server.wait_until_ready()
        generated(server, **QUICK)
        worker = worker_of(server)

        paused = server.client.post("/run", json={"input": long}).json()["id"]
        until(lambda: status_of(server, paused) == "IN_PROGRESS")
        time.sleep(0.5)  # it has 150 steps
        worker.send_signal(signal.SIGSTOP)
        time.sleep(2 * STALL)
        worker.send_signal(signal.SIGCONT)
        until(lambda: status_of(server, paused) == "COMPLETED")
        assert server.client.get("/livez").status_code == 200

        (tmp_path / "state" / "hang").touch()
        job_id = server.client.post("/run", json={"input": long}).json()["id"]
        until(lambda: status_of(server, job_id) == "IN_PROGRESS")
        stuck = pool.submit(post, server, **{**long, "seed": HANGING_SEED})
        beside = pool.submit(post, server, **long)
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
