"""A GPU that fails for good: the health routes ask for the server to be replaced."""

from __future__ import annotations

from pathlib import Path

from tests.support.device_errors import FATAL_SEED
from tests.support.server import QUICK, assert_error, generated, post, serving


def test_a_server_whose_gpu_has_failed_asks_to_be_replaced(tmp_path: Path) -> None:
    with serving(tmp_path, target="tests.support.failing_gpu:StableDiffusion") as server:
        server.wait_until_ready()
        generated(server, **QUICK)
        assert server.client.get("/livez").status_code == 200
        assert server.client.get("/ping").status_code == 200

        fatal = {**QUICK, "seed": FATAL_SEED}
        assert_error(post(server, **fatal), 500, "the device failed")

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
        assert "this process ends in" in log
