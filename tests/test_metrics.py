"""The numbers of processes that have died."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sdbento.metrics import forget_dead_processes

# As BentoML's middleware counts, in a process that is killed meanwhile.
KILLED = """
import os, prometheus_client as metrics
requests = metrics.Gauge("requests", "", multiprocess_mode="livesum")
requests.inc()
metrics.Counter("total", "").inc()
os.kill(os.getpid(), 9)
"""
SCRAPE = """
import prometheus_client as metrics
from prometheus_client.multiprocess import MultiProcessCollector
registry = metrics.CollectorRegistry()
MultiProcessCollector(registry)
print(registry.get_sample_value("requests"))
"""


def test_a_process_that_was_killed_has_no_requests_in_progress(tmp_path: Path) -> None:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def run(program: str) -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True).stdout

    run(KILLED)
    assert run(SCRAPE) == "1.0\n"
    own = tmp_path / f"counter_{os.getpid()}.db"
    other = tmp_path / "notes"
    for file in (own, other):
        file.touch()
    assert len(list(tmp_path.iterdir())) == 4
    forget_dead_processes(tmp_path)
    assert set(tmp_path.iterdir()) == {own, other}
    own.unlink()
    assert run(SCRAPE) == "None\n"
