"""A real `bentoml serve` process for tests: its own port and BENTOML_HOME, stopped by SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
START_LIMIT = 120.0  # seconds until ready; importing torch on a busy machine takes a while


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        """SIGTERM to the supervisor, as an operator would; its exit status."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=15)


@contextmanager
def serving(
    folder: Path, *, target: str = "service:StableDiffusion", cwd: Path = ROOT, **variables: str
) -> Iterator[Server]:
    """Start `target` with `variables` set; its log and BentoML's home lie in `folder`."""
    port, log = free_port(), folder / "server.log"
    environment = os.environ | {
        "BENTOML_HOME": str(folder / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "1",
        "SD_MODEL": "shapes",
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
