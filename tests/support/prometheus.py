"""The machine's own Prometheus and its tool, `promtool`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import free_port

REQUIRED = "REQUIRE_PROMETHEUS"  # set where tests must not be skipped for want of it
START_LIMIT = 60.0  # seconds


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`; the test is skipped where there is none."""
    if (path := shutil.which(name)) is not None:
        return path
    missing = "the machine has no Prometheus (Debian: apt-get install prometheus)"
    if os.environ.get(REQUIRED):
        pytest.fail(missing)
    pytest.skip(missing)


def promtool(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [program("promtool"), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Prometheus:
    """A running one; `http` is its API."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30.0, trust_env=False)

    def ready(self) -> bool:
        try:
            return self.http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = self.http.get("/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found


@contextmanager
def prometheus(folder: Path, target: str, key: str) -> Iterator[Prometheus]:
    """One that scrapes `target`, a host and its port, each second; all it has lies in `folder`."""
    config, port = folder / "prometheus.yaml", free_port()
    scrape = {
        "job_name": "sdbento",
        "static_configs": [{"targets": [target]}],
        "authorization": {"credentials": key},
    }
    settings = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    running = Prometheus(f"http://127.0.0.1:{port}")
    try:
        give_up = time.monotonic() + START_LIMIT
        while not running.ready():
            assert process.poll() is None and time.monotonic() < give_up, log.name
            time.sleep(0.1)
        yield running
    finally:
        running.http.close()
        process.terminate()
        process.wait(timeout=30)
