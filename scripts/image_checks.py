"""What `scripts/image-smoke` checks in a container: it serves, works for RunPod, runs a command.

    python -m scripts.image_checks CONTAINER ENTRYPOINT {serve,worker,other}

CONTAINER is buildah's. Knows nothing of how the image was built.
"""

from __future__ import annotations

import base64
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image

from tests.support.platform import KEY, Platform
from tests.support.server import free_port

USER = 1034  # BentoML's
START_LIMIT, STOP_LIMIT = 180.0, 60.0  # seconds
RED_ON_BLUE = {"prompt": "a large red circle on a blue background", "seed": 1}


@dataclass
class Process:
    """The process in the container, and its output so far."""

    popen: subprocess.Popen[bytes]
    log: Path

    def until(self, condition: Callable[[], bool], what: str) -> float:
        """Wait for `condition`; the seconds it took."""
        started = time.monotonic()
        while not condition():
            waited = time.monotonic() - started
            if self.popen.poll() is not None or waited > START_LIMIT:
                tail = self.log.read_text(errors="replace")[-4000:]
                sys.exit(f"image-smoke: {what}: not after {waited:.0f} s:\n{tail}")
            time.sleep(0.05)
        return time.monotonic() - started

    def stop(self) -> int:
        """SIGTERM to the container's first process, as engines send it; the exit status."""
        inside = [process for process in self.tree() if process.uids().real == USER]
        entrypoint = next(process for process in inside if "buildah" not in process.cmdline()[0])
        entrypoint.send_signal(signal.SIGTERM)
        return self.popen.wait(STOP_LIMIT)

    def kill(self) -> None:
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.popen.wait()

    def tree(self) -> list[psutil.Process]:
        """Parents before their children."""
        if self.popen.poll() is not None:
            return []
        buildah = psutil.Process(self.popen.pid)
        return [buildah, *buildah.children(recursive=True)]


def command(place: list[str], args: list[str], variables: dict[str, str]) -> list[str]:
    container, entrypoint = place
    buildah = ["buildah", "run", "--isolation", "chroot", "--network", "host"]
    for name, value in variables.items():
        buildah += ["--env", f"{name}={value}"]
    return [*buildah, container, "--", entrypoint, *args]


@contextmanager
def running(place: list[str], *args: str, **variables: str) -> Iterator[Process]:
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        popen = subprocess.Popen(
            command(place, list(args), variables),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        process = Process(popen, Path(log.name))
        try:
            yield process
        finally:
            process.kill()


def check_generated_image(data: bytes) -> None:
    """A PNG of the model's own size that shows what was asked for."""
    image = Image.open(BytesIO(data))
    expect(image.format == "PNG" and image.size == (128, 128), f"{image.format} {image.size}")
    middle, corner = (image.convert("RGB").getpixel(place) for place in ((64, 64), (4, 4)))
    assert isinstance(middle, tuple) and isinstance(corner, tuple)
    expect(middle[0] > 150 > max(middle[1:]), f"the middle is not red: {middle}")
    expect(corner[2] > 150 > max(corner[:2]), f"the corner is not blue: {corner}")


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"image-smoke: {otherwise}")


def serve(place: list[str]) -> None:
    """PORT and PORT_HEALTH as a load-balanced endpoint sets them; /ping says when it is ready."""
    port, health = free_port(), free_port()
    url, pings = f"http://127.0.0.1:{port}", set[int]()

    def pinged() -> bool:
        try:
            status = httpx.get(f"http://127.0.0.1:{health}/ping", trust_env=False).status_code
        except httpx.TransportError:
            return False
        pings.add(status)
        return status == 200

    with running(place, PORT=str(port), PORT_HEALTH=str(health), SD_MODEL="shapes") as server:
        seconds = server.until(pinged, "/ping answers 200")
        expect(pings <= {200, 204}, f"/ping answered {pings}")
        answer = httpx.post(f"{url}/txt2img", json=RED_ON_BLUE, timeout=60, trust_env=False)
        expect(answer.status_code == 200, answer.text)
        check_generated_image(answer.content)
        on_port = httpx.get(f"{url}/ping", trust_env=False).status_code
        expect(on_port == 200, f"/ping on PORT: {on_port}")
        status = server.stop()
    print(f"ready after {seconds:.1f} s (/ping: {sorted(pings)}), an image, exit status {status}")
    expect(status == 0, f"the server ended with {status}")


def worker(place: list[str]) -> None:
    """The variables of a queue endpoint, and neither a command nor a model: the image itself sees
    what to start, and has a model of its own."""
    platform = Platform()
    platform.start()
    base = f"{platform.url}/v2/smoke"
    with running(
        place,
        RUNPOD_POD_ID="smoke",
        RUNPOD_AI_API_KEY=KEY,
        RUNPOD_ENDPOINT_ID="smoke",
        RUNPOD_PING_INTERVAL="1000",
        RUNPOD_WEBHOOK_GET_JOB=f"{base}/job-take/$ID?gpu=SIM",
        RUNPOD_WEBHOOK_POST_OUTPUT=f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=SIM",
        RUNPOD_WEBHOOK_POST_STREAM=f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=SIM",
        RUNPOD_WEBHOOK_PING=f"{base}/ping/$RUNPOD_POD_ID?gpu=SIM",
        RUNPOD_SKIP_AUTO_SYSTEM_CHECKS="true",  # they reach for a public DNS
        RUNPOD_SKIP_GPU_CHECK="true",
        SDBENTO_RUNPOD_DRAIN_SECONDS="2",
    ) as process:
        seconds = process.until(lambda: "smoke" in platform.polls, "the worker takes jobs")
        jobs: list[Any] = [platform.submit("smoke", dict(RED_ON_BLUE)) for _ in range(3)]
        for job in jobs:
            process.until(job.ended.is_set, f"{job.id} ends")
            check_generated_image(base64.b64decode(job.output[0], validate=True))
        status = process.stop()
    platform.stop()
    print(f"takes jobs after {seconds:.1f} s, {len(jobs)} jobs done, exit status {status}")
    expect(status == 0, f"the worker ended with {status}")


def other(place: list[str]) -> None:
    user = output(place, "python", "-c", "import os; print(os.getuid())").strip()
    expect(user == str(USER), f"runs as user {user}")
    models = output(place, "sdbento", "models")
    expect("shapes" in models and "mine" in models, f"sdbento models says {models!r}")
    program = "echo '#include <stdio.h>' | gcc -x c -shared -fPIC -o /tmp/empty.so -"
    output(place, "sh", "-c", program)  # as Triton does for its kernels
    print(f"runs as user {user}, compiles C")


def output(place: list[str], *args: str) -> str:
    done = subprocess.run(command(place, list(args), {}), capture_output=True, text=True)
    expect(done.returncode == 0, f"{args} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    *where, check = sys.argv[1:]
    {"serve": serve, "worker": worker, "other": other}[check](where)
