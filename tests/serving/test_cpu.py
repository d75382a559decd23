"""What makes a CPU fast, in real processes: only the engine's thread computes with a team of OpenMP
threads (`sdbento.process.threads`), and memory that was freed is kept (`sdbento.process.malloc`).

libgomp itself says who has a team: with OMP_DISPLAY_AFFINITY it prints a line for every thread that
joins one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.doors.cli.test_commands import run
from tests.support.images import base64, gradient
from tests.support.server import ROOT, Server, generated, serving

pytestmark = pytest.mark.long

TELLING: dict[str, Any] = {
    "OMP_NUM_THREADS": "2",
    "OMP_DISPLAY_AFFINITY": "TRUE",
    "OMP_AFFINITY_FORMAT": "team of %N: thread %n is %i",
    "SDBENTO_CUDA_GRAPHS": "true",
}
SHAPES = ROOT / "sdbento" / "bundled" / "shapes"


def teams(log: str) -> list[tuple[int, str]]:
    """(threads, the thread that leads them) of every team."""
    found = re.findall(r"team of (\d+): thread 0 is (\w+)", log)
    return [(int(size), leader) for size, leader in found]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(SHAPES, folder / "models" / "other")
    models = str(folder / "models")
    with serving(folder, SDBENTO_MODELS_DIR=models, MAX_BATCH_SIZE="8", **TELLING) as server:
        server.wait_until_ready()
        yield server


def test_what_a_cpu_cannot_do_is_said_once(server: Server) -> None:
    log = server.log.read_text()
    assert log.count("PRECISION=fp16 needs a GPU: computing in fp32 on the CPU") == 1
    assert log.count("SDBENTO_CUDA_GRAPHS needs a GPU: steps are computed eagerly") == 1


def test_only_one_thread_has_a_team_whatever_a_server_does(server: Server) -> None:
    image = base64(gradient(128, 128))
    quick = {"prompt": "a red circle", "num_inference_steps": 4}
    for sampler in ("DDIM", "Euler a", "DPM++ 2M Karras", "UniPC", "Heun"):
        generated(server, **quick, scheduler=sampler)
    generated(server, **quick, model="other", num_images=8)
    generated(server, **quick, lora=[{"model_id": "outline"}, {"model_id": "checker"}])
    generated(server, **quick, image=image, mask_image=image, preview_every=1)
    generated(server, **quick, controlnet={"type": "canny", "image": image})
    generated(server, **quick, hires={"scale": 2, "strength": 0.5}, output_format="webp")
    assert len(teams(server.log.read_text())) == 1


def test_memory_that_was_freed_is_kept_for_the_next_call(server: Server) -> None:
    def make_a_large_one() -> int:
        """Page faults of one 512 x 512 image: 70000 if all freed memory was returned in between."""
        family = psutil.Process(server.process.pid).children(recursive=True)
        before = sum(map(page_faults, family))
        generated(server, prompt="x", width=512, height=512, num_inference_steps=1)
        return sum(map(page_faults, family)) - before

    # At first the heap still grows.
    assert min(make_a_large_one() for _ in range(4)) < 10_000


def page_faults(process: psutil.Process) -> int:
    """Minor page faults: field 10 of proc_pid_stat(5)."""
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[7])


def test_the_command_line_computes_on_one_team(tmp_path: Path) -> None:
    command = ("generate", "a circle", "--model", "shapes", "--steps", "2", "-o", "out.png")
    done = run(*command, cwd=tmp_path, **TELLING)
    assert done.returncode == 0
    assert [size for size, _ in teams(done.stderr)] == [2]


def test_a_worker_computes_on_one_team_of_the_configured_number_of_threads(tmp_path: Path) -> None:
    job = json.dumps({"input": {"prompt": "a red circle", "num_inference_steps": 2}})
    variables = {
        **TELLING,
        "SD_MODEL": "shapes",
        "SDBENTO_NUM_THREADS": "3",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
    }
    done = run("worker", "--test_input", job, cwd=tmp_path, **variables)
    assert done.returncode == 0
    assert [size for size, _ in teams(done.stderr)] == [3]
