"""kill -9 of the worker and of the supervisor, while jobs that were accepted wait and run."""

from __future__ import annotations

import time
from base64 import b64decode
from random import Random

from tests.soak.ground import Ground
from tests.soak.load import Oracle
from tests.support.server import pixels

JOBS = 6  # before each kill
COMPLETION_LIMIT = 180.0  # seconds from a start until the jobs of before are completed


def faults(ground: Ground, oracle: Oracle, chance: Random) -> None:
    for turn, _ in enumerate(ground.pauses(chance, 20.0, 40.0)):
        accepted = _submit(ground, oracle, chance)
        time.sleep(chance.uniform(0.0, 3.0))
        kill = ground.kill_supervisor if turn % 2 else ground.kill_worker
        with ground.record.disturbance():
            seconds = kill()
        ground.record.answered("faults", kill.__name__, seconds)
        print(f"{kill.__name__}: ready again after {seconds:.1f} s", flush=True)
        _expect_completed(ground, oracle, accepted)


def _submit(ground: Ground, oracle: Oracle, chance: Random) -> dict[str, int]:
    """Ids of accepted jobs, with the numbers of the calls that they make."""
    plain = [i for i, (call, _) in enumerate(oracle.alone) if call.path == "/generate"]
    accepted = {}
    for i in chance.choices(plain, k=JOBS):
        body = {"input": oracle.alone[i][0].body}
        answer = ground.ask("faults", "POST", "/run", (200,), json=body)
        if answer is not None:
            accepted[answer.json()["id"]] = i
    return accepted


def _expect_completed(ground: Ground, oracle: Oracle, accepted: dict[str, int]) -> None:
    give_up = time.monotonic() + COMPLETION_LIMIT
    waiting = dict(accepted)
    while waiting and time.monotonic() < give_up:
        time.sleep(0.5)
        for job_id, i in list(waiting.items()):
            answer = ground.ask("faults", "GET", f"/status/{job_id}", (200,))
            if answer is None:
                del waiting[job_id]
                continue
            status, (call, alone) = answer.json()["status"], oracle.alone[i]
            if status == "COMPLETED":
                made = [pixels(b64decode(image)) for image in answer.json()["output"]]
                ground.record.compare("faults", call, made, alone)
            if status not in ("IN_QUEUE", "IN_PROGRESS"):
                del waiting[job_id]
                if status != "COMPLETED":
                    ground.record.problem(f"faults: a job that was accepted ends {answer.text}")
    for job_id in waiting:
        ground.record.problem(f"faults: {job_id} did not end in {COMPLETION_LIMIT:.0f} s")
