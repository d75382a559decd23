"""The server of a soak: its users, models and folders, and how it is killed and started again."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil

from sdbento.access import entries
from tests.soak.calls import OTHER_MODEL, Call, images_of
from tests.soak.record import Images, Record
from tests.soak.samples import worker_of
from tests.support.server import Server, pixels, serving
from tests.support.tiny import save_tiny

TIMEOUT = 180.0  # seconds for any answer
RESTART_LIMIT = 60.0  # seconds in which a worker that was killed must be replaced
OPERATOR = "operator"
VARIABLES: dict[str, Any] = {
    "OMP_NUM_THREADS": "1",  # tiny models: threads would only wait for each other
    "SDBENTO_NUM_THREADS": "1",
    "MAX_QUEUE_SIZE": "24",
    "SDBENTO_ALLOW_PRIVATE_URLS": "true",  # strangers and webhooks on loopback
    "SDBENTO_FETCH_TIMEOUT": "8",
    "SDBENTO_MAX_PIXELS": "65536",
    "SDBENTO_MAX_BODY_BYTES": "1000000",
    "SDBENTO_JOB_RESULT_SECONDS": "600",
}


class Ground:
    """A server with keys. `server` changes when it is started again, `url` never does."""

    def __init__(self, folder: Path, port: int, record: Record, pace: float) -> None:
        self.folder, self.port, self.record, self.pace = folder, port, record, pace
        self.url = f"http://127.0.0.1:{port}"
        self.file = folder / "keys.yaml"
        self.keys: dict[str, str] = {}
        self.stop = threading.Event()
        self.work = threading.Event()  # cleared: no new requests, so that the server can rest
        self.work.set()
        self.http = httpx.Client(
            base_url=self.url,
            timeout=TIMEOUT,
            trust_env=False,
            limits=httpx.Limits(max_connections=500, max_keepalive_connections=10),
        )
        self.server: Server
        self.logs: list[Path] = []
        self._stack = ExitStack()
        self.add_user(OPERATOR)
        save_tiny("sdxl", folder / "models" / OTHER_MODEL)

    def add_user(self, name: str, password: str | None = None, **limits: Any) -> None:
        self.keys[name] = entries.add(self.file, name, password, **limits) or password or ""

    def start(self) -> None:
        folder = self.folder / f"start-{len(self.logs) + 1}"
        folder.mkdir()
        variables = VARIABLES | {
            "SDBENTO_API_KEYS": str(self.file),
            "SDBENTO_MODELS_DIR": str(self.folder / "models"),
            "SDBENTO_STATE_DIR": str(self.folder / "state"),
        }
        self.server = self._stack.enter_context(serving(folder, port=self.port, **variables))
        self.logs.append(self.server.log)
        self.server.wait_until_ready()

    def close(self) -> None:
        self._stack.close()
        self.http.close()

    def kill_worker(self) -> float:
        """kill -9 of the process that computes; seconds until another one is ready."""
        supervisor = self.server.process.pid
        worker = worker_of(supervisor)
        assert worker is not None
        start = time.monotonic()
        worker.kill()
        while time.monotonic() - start < RESTART_LIMIT:
            other = worker_of(supervisor)
            if other is not None and other.pid != worker.pid and self._is_ready():
                return time.monotonic() - start
            time.sleep(0.2)
        self.record.problem(f"faults: no new worker {RESTART_LIMIT:.0f} s after the old one died")
        self.server.kill()
        self.start()
        return time.monotonic() - start

    def kill_supervisor(self) -> float:
        """kill -9 of BentoML's supervisor, then what an init system does: end what is left of its
        processes and start it again. Seconds until it is ready."""
        supervisor = psutil.Process(self.server.process.pid)
        family = supervisor.children(recursive=True)
        start = time.monotonic()
        supervisor.kill()
        _, left = psutil.wait_procs(family, timeout=5)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left)
        self.server.process.wait()
        self.start()
        return time.monotonic() - start

    def _is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return self.http.get("/readyz").status_code == 200
        return False

    def ask(
        self, mode: str, method: str, path: str, expected: Collection[int], **options: Any
    ) -> httpx.Response | None:
        """One request with the key of `mode`, or of `user`. None, told as a problem unless the
        server was being killed, for an answer that is not expected."""
        user = options.pop("user", mode)
        headers = {"Authorization": f"Bearer {self.keys[user]}"} | options.pop("headers", {})
        start, status, text = time.monotonic(), "", ""
        try:
            answer = self.http.request(method, path, headers=headers, **options)
            status, text = str(answer.status_code), answer.text[:300]
        except httpx.TransportError as error:
            answer, status, text = None, type(error).__name__, str(error)
        self.record.answered(mode, status, time.monotonic() - start)
        if answer is not None and answer.status_code in expected:
            return answer
        if not self.record.excused(start):
            self.record.problem(f"{mode}: {method} {path} answers {status}: {text}")
        return None

    def make(
        self, mode: str, call: Call, expected: Collection[int] = (200,), **options: Any
    ) -> Images | None:
        """The images of a call; None if it was not answered with 200."""
        answer = self.ask(mode, "POST", call.path, expected, json=call.body, **options)
        if answer is None or answer.status_code != 200:
            return None
        try:
            return [pixels(data) for data in images_of(call, answer)]
        except (KeyError, ValueError, OSError) as error:
            if not answer.text or '"COMPLETED"' in answer.text or "/run" not in call.path:
                self.record.problem(f"{mode}: {call.path}: {error!r}: {answer.text[:300]}")
            return None

    def pauses(self, chance: Random, least: float, most: float) -> Iterator[None]:
        """Between the rounds of a mode, until the soak ends; longer at a lower pace."""
        while not self.stop.wait(chance.uniform(least, most) / self.pace):
            self.work.wait()
            if self.stop.is_set():
                return
            yield


@contextmanager
def ground(folder: Path, port: int, record: Record, pace: float) -> Iterator[Ground]:
    made = Ground(folder, port, record, pace)
    try:
        made.start()
        yield made
    finally:
        made.close()
