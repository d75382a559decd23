"""SIGTERM for a server that has more to do than it may finish."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sdbento.jobs.store.job_store import JobStore
from tests.support.server import QUICK, assert_error, post, serving

LONG = {**QUICK, "num_inference_steps": 150, "num_images": 16}
UNFINISHED = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"


def test_what_takes_too_long_gets_an_error_and_jobs_are_kept(tmp_path: Path) -> None:
    """A client that never sends the rest of its request does not keep the server from ending."""
    with serving(tmp_path, SDBENTO_SHUTDOWN_TIMEOUT="1") as server:
        server.wait_until_ready()
        port = server.client.base_url.port
        with ThreadPoolExecutor() as clients, socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(UNFINISHED)
            job = post(server, "/run", input=LONG).json()
            answers = [clients.submit(post, server, **LONG) for _ in range(3)]
            assert post(server, **QUICK).status_code == 200
            server.process.terminate()
            for answer in answers:
                assert_error(answer.result(60), 503, "stopping")
                assert int(answer.result().headers["retry-after"]) >= 1
            server.process.wait(60)
    store = JobStore(tmp_path / "state")
    kept = store.get(job["id"])
    store.close()
    assert kept is not None and kept.status == "IN_QUEUE"
