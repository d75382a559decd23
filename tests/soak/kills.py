"""The mode `kills`: kill -9 at random moments while jobs arrive and run; nothing may be lost.

Four clients submit jobs of every kind to POST /run. Meanwhile the server is killed with all its
processes and started again on the same folder, over and over, also while it starts. In the end

    every job that was accepted is COMPLETED,
    what was once read as COMPLETED reads the same for ever,
    every image is the one that an undisturbed server makes,
    every webhook was posted.

The seed repeats the same kills and jobs, as far as a machine's timing repeats.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from base64 import b64decode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.support.images import base64, gradient, half_mask
from tests.support.listener import Listener, listening
from tests.support.server import Server, free_port, generated, pixels, serving

CLIENTS = 4
KILL_AFTER = (0.0, 15.0)  # seconds from a start; ready after about 6
BETWEEN_JOBS = (0.0, 6.0)  # seconds a client waits before its next job
COMPLETION_LIMIT = 900.0  # seconds for everything to be completed after the last kill
DONE = "COMPLETED"
VARIABLES: Any = {"SDBENTO_ALLOW_PRIVATE_URLS": "true"}  # webhooks on loopback

Answer = dict[str, Any]


def job_input(i: int) -> dict[str, Any]:
    """The i-th job: each of another seed, of the kinds in turn."""
    image = {"image": base64(gradient(128, 128, seed=i)), "strength": 0.7}
    kinds: list[dict[str, Any]] = [
        {"num_inference_steps": 25},
        {"num_images": 3, "scheduler": "DPM++ 2M"},
        image,
        {**image, "mask_image": base64(half_mask(128, 128)), "scheduler": "Euler a"},
        {"controlnet": {"type": "canny", "image": base64(gradient(128, 128))}},
        {"lora": [{"model_id": "shapes-outline"}], "num_inference_steps": 40},
    ]
    prompt = f"a {['red', 'green', 'blue', 'yellow'][i % 4]} square"
    basics = {"prompt": prompt, "seed": i, "width": 128, "height": 128, "num_inference_steps": 12}
    return basics | kinds[i % len(kinds)]


class Jobs:
    """The jobs as their clients know them: which were accepted, and which answers were read."""

    def __init__(self, port: int, webhook: str) -> None:
        self.port = port
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=30.0, trust_env=False
        )
        self.webhook = webhook
        self.accepted: dict[str, int] = {}  # id -> number of the input
        self.completed: dict[str, Answer] = {}
        self.changed: set[str] = set()  # ids that were COMPLETED and later answered differently
        self.ended_otherwise: dict[str, Answer] = {}

    def submit(self, i: int) -> None:
        """Repeats until the job is accepted, which it is when its id was received."""
        body = {"input": job_input(i) | {"return": "full"}, "webhook": self.webhook}
        while True:
            with suppress(httpx.TransportError):
                response = self.client.post("/run", json=body)
                response.raise_for_status()
                self.accepted[response.json()["id"]] = i
                return
            time.sleep(0.1)

    def look(self, job_id: str) -> None:
        response = self.client.get(f"/status/{job_id}")
        answer = response.json()
        if job_id in self.completed:
            if answer != self.completed[job_id]:
                self.changed.add(job_id)
        elif answer.get("status") == DONE:
            self.completed[job_id] = answer
        elif answer.get("status") not in ("IN_QUEUE", "IN_PROGRESS"):
            self.ended_otherwise[job_id] = answer

    def watch(self, stop: threading.Event) -> None:
        while not stop.wait(0.05):
            with suppress(httpx.TransportError):
                for job_id in list(self.accepted):
                    self.look(job_id)


def kill_again_and_again(folder: Path, kills: int, jobs: Jobs, chance: random.Random) -> None:
    for number in range(1, kills + 1):
        with serving(folder, port=jobs.port, **VARIABLES) as server:
            seconds = chance.uniform(*KILL_AFTER)
            time.sleep(seconds)
            server.kill()
        print(
            f"kill {number:2}: {seconds:4.1f} s after the start, "
            f"{len(jobs.accepted)} jobs accepted, {len(jobs.completed)} completed",
            flush=True,
        )


def finish(server: Server, jobs: Jobs, listener: Listener) -> None:
    give_up = time.monotonic() + COMPLETION_LIMIT
    while time.monotonic() < give_up and not jobs.ended_otherwise:
        posted = {body["id"] for body in list(listener.heard)}
        if jobs.completed.keys() >= jobs.accepted.keys() <= posted:
            break
        time.sleep(0.2)
    print(f"server log: {server.log.read_text().count('ERROR')} errors after the last start")


def verdicts(server: Server, jobs: Jobs, listener: Listener) -> list[str]:
    """What went wrong; solo runs of the same inputs are the oracle."""
    posted = {body["id"]: body for body in listener.heard}
    problems = [f"{job_id} is not completed" for job_id in jobs.accepted.keys() - jobs.completed]
    problems += [f"{job_id} ended as {a}" for job_id, a in jobs.ended_otherwise.items()]
    problems += [f"{job_id} changed after it was COMPLETED" for job_id in jobs.changed]
    problems += [
        f"the webhook of {job_id} was not posted" for job_id in jobs.accepted.keys() - posted
    ]
    problems += [
        f"the webhook of {job_id} got another answer"
        for job_id, answer in jobs.completed.items()
        if job_id in posted and posted[job_id] != answer
    ]
    for job_id, answer in jobs.completed.items():
        alone = generated(server, **job_input(jobs.accepted[job_id]))
        made = [pixels(b64decode(image)) for image in answer["output"]["images"]]
        if len(made) != len(alone) or any(
            np.abs(a - b).max() > 1 for a, b in zip(made, alone, strict=True)
        ):
            problems.append(f"{job_id} (input {jobs.accepted[job_id]}) is not its solo run")
    return problems


def run(num_jobs: int, kills: int, seed: int) -> int:
    print(f"kills --jobs {num_jobs} --kills {kills} --seed {seed}", flush=True)
    chance, stop = random.Random(seed), threading.Event()
    pauses = [chance.uniform(*BETWEEN_JOBS) for _ in range(num_jobs)]
    with tempfile.TemporaryDirectory() as folder, listening() as listener:
        jobs = Jobs(free_port(), listener.url)
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            watching = pool.submit(jobs.watch, stop)

            def submit(i: int) -> None:
                time.sleep(pauses[i])
                jobs.submit(i)

            submitting = [pool.submit(submit, i) for i in range(num_jobs)]
            kill_again_and_again(Path(folder), kills, jobs, chance)
            with serving(Path(folder), port=jobs.port, **VARIABLES) as server:
                server.wait_until_ready()
                for future in submitting:
                    future.result()
                finish(server, jobs, listener)
                stop.set()
                watching.result()
                problems = verdicts(server, jobs, listener)
    for problem in problems:
        print(problem)
    print(f"{len(jobs.accepted)} jobs accepted, {len(jobs.completed)} completed")
    repeats = Counter(body["id"] for body in listener.heard)
    print(f"webhooks posted more than once: {sum(n > 1 for n in repeats.values())}")
    print("FAILED" if problems else "nothing lost, nothing changed")
    return 1 if problems else 0
