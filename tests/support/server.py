"""A real `bentoml serve` process for tests: its own port and BENTOML_HOME, stopped by SIGTERM."""

from __future__ import annotations

import base64
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from httpx import Response
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).parents[2]
START_LIMIT = 120.0  # seconds until ready; importing torch on a busy machine takes a while


def free_port() -> int:
    """A free port below those that systems give to clients, any of which could take it first."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free between 20000 and 32000")


class Server:
    """A running server: `url`, a `client` for it, its process and its log."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log
        self.client = httpx.Client(base_url=url, timeout=120.0, trust_env=False)

    def wait_until_ready(self) -> None:
        give_up = time.monotonic() + START_LIMIT
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"the server did not get ready:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        """SIGTERM to the supervisor, as an operator would; its exit status.

        Requests under way are finished first, for SDBENTO_SHUTDOWN_TIMEOUT seconds and 8 more.
        """
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=40)

    def kill(self) -> None:
        """SIGKILL to every process of the server, as when the machine fails."""
        self.client.close()
        if self.process.poll() is not None:
            return
        supervisor = psutil.Process(self.process.pid)
        family = [supervisor, *supervisor.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family)

    def kill_supervisor(self) -> None:
        """SIGKILL to the supervisor alone. Waits until the rest has ended and the port is free."""
        serving = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(serving, timeout=60)
        assert not alive
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self.client.base_url.port))


@contextmanager
def serving(
    folder: Path,
    *,
    target: str = "service:StableDiffusion",
    cwd: Path = ROOT,
    port: int | None = None,
    **variables: str,
) -> Iterator[Server]:
    """Start `target` with `variables` set; its log, jobs and BentoML's home lie in `folder`."""
    port, log = port or free_port(), folder / "server.log"
    environment = os.environ | {
        "BENTOML_HOME": str(folder / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "1",
        "SD_MODEL": "shapes",
        "SDBENTO_STATE_DIR": str(folder / "state"),
        **variables,
    }
    command = [sys.executable, "-m", "bentoml", "serve", target]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=cwd,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        yield server
    finally:
        server.stop()


QUICK: dict[str, Any] = {
    "prompt": "a red circle on a blue background",
    "num_inference_steps": 4,
    "seed": 7,
}


def post(server: Server, path: str = "/generate", **fields: Any) -> Response:
    return server.client.post(path, json=fields)


def pixels(data: bytes) -> NDArray[np.int16]:
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"), dtype=np.int16)


def alike(one: NDArray[np.int16], other: NDArray[np.int16]) -> bool:
    """Whether two images are the same. Who shares their calls, which may differ from one run to the
    next, decides how the last bit is rounded."""
    return one.shape == other.shape and bool(np.abs(one - other).max() <= 1)


def generated(server: Server, **fields: Any) -> list[NDArray[np.int16]]:
    response = post(server, **fields)
    assert response.status_code == 200, response.text
    return [pixels(base64.b64decode(image)) for image in response.json()["images"]]


def assert_error(response: Response, status: int, *words: str, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"type", "message", "param"}
    for word in words:
        assert word in error["message"]
    if param is not None:
        assert error["param"] == param
