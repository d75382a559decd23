"""The command line in real processes: what they print and their exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import pytest
from PIL import Image

from sdbento.doors.cli import commands
from sdbento.doors.cli.commands import main
from tests.support.server import ROOT, free_port

SHAPES = ["--model", "shapes"]
QUICK = [*SHAPES, "--steps", "2", "--seed", "1"]
RED_CIRCLE = "a large red circle on a blue background"
SDBENTO = [str(Path(sys.executable).with_name("sdbento"))]


def run(*args: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """`sdbento args` with its output; it must never show a traceback."""
    done = subprocess.run(
        [*SDBENTO, *args],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=cwd,
        env=os.environ | variables,
    )
    assert "Traceback" not in done.stderr
    return done


def complaint(*args: str, status: int = 1, **variables: str) -> str:
    """The one line on stderr of a run that must fail."""
    done = run(*args, cwd=None, **variables)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("sdbento: ").strip()


@pytest.fixture
def called(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process, which has imported torch already: its exit status, what it
    printed, and its one line on stderr."""
    monkeypatch.setattr(commands, "keep_freed_memory", lambda: None)  # for the whole process

    def call(*args: str) -> tuple[int, str, str]:
        status = main(list(args))
        printed = capfd.readouterr()
        return status, printed.out, printed.err.removeprefix("sdbento: ").removesuffix("\n")

    return call


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in (
        "serve",
        "generate",
        "inspect",
        "models",
        "samplers",
        "pull",
        "bench",
        "completion",
        "top",
        "worker",
        "doctor",
    ):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["serve", "--help"], ["-h"]])
def test_nothing_heavy_is_imported_to_answer(args: list[str]) -> None:
    code = (
        "import sys; from sdbento.doors.cli.commands import main; "
        "status = main(sys.argv[1:]);"
        "sys.exit(status or bool({'torch', 'diffusers', 'bentoml'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True)


def test_the_command_runs_as_a_module_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdbento", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("sdbento, version ")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["paint"],
        ["generate"],
        ["generate", "a cat", "--steps", "many"],
        ["generate", "a cat", "-o", "cat.gif"],
        ["generate", "a cat", "-o", "no/such/folder/cat.png"],
        ["serve", "--port", "70000"],
        ["worker", "--test_inptu", "{}"],
        ["worker", "--rp_debugger"],  # the SDK fails every job with it
        ["worker", "--test_input", "a cat"],
        ["worker", "--test_input", "[1]"],
        ["worker", "--rp_log_level", "DEBUG"],  # prints images
    ],
)
def test_wrong_usage_ends_with_2(args: list[str]) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert "Usage: sdbento" in done.stderr + done.stdout


def test_a_parameter_out_of_bounds_is_refused_as_over_http() -> None:
    assert complaint("generate", "x", "--width", "513") == (
        "width should be a multiple of 8; given: 513"
    )


@pytest.mark.parametrize("command", [["serve"], ["models"], ["doctor"], ["generate", "a cat"]])
def test_a_bad_setting_is_one_line(command: list[str]) -> None:
    text = complaint(*command, MAX_QUEUE_SIZE="0")
    assert text == "MAX_QUEUE_SIZE='0': input should be greater than or equal to 1"


def test_a_worker_without_a_queue_says_how_to_try_a_job() -> None:
    text = complaint("worker")
    assert "RUNPOD_WEBHOOK_GET_JOB" in text
    assert "--test_input '{" in text


def test_a_variable_that_runpods_sdk_cannot_read_is_one_line() -> None:
    assert "bad: Invalid debug level: LOUD" in complaint("worker", RUNPOD_LOG_LEVEL="loud")


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["generate", "x", "--model", "no-such-model"], "no-such-model"),
        (["pull", "no-such-model"], "no-such-model"),
        (["generate", "x", *SHAPES, "--scheduler", "Eulr"], "Eulr"),
    ],
    ids=["model", "pull", "sampler"],
)
def test_a_name_that_means_nothing_is_one_line(
    args: list[str],
    word: str,
    called: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SDBENTO_OFFLINE", "1")
    status, printed, complaint = called(*args)
    assert (status, printed) == (1, "")
    assert word in complaint
    assert "\n" not in complaint


def test_an_image_is_made_with_its_parameters_inside(tmp_path: Path) -> None:
    done = run("generate", RED_CIRCLE, *QUICK, "-o", "circle.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.fullmatch(r"circle\.png: shapes, seed 1, \d+\.\d s\n", done.stdout)
    with Image.open(tmp_path / "circle.png") as image:
        assert RED_CIRCLE in json.dumps(image.info)


def test_several_images_are_numbered_in_the_format_of_the_name(
    tmp_path: Path, called: Callable[..., tuple[int, str, str]]
) -> None:
    output = tmp_path / "circle.jpg"
    status, *_ = called("generate", RED_CIRCLE, *QUICK, "--num-images", "2", "-o", str(output))
    assert status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle-1.jpg", "circle-2.jpg"]
    with Image.open(tmp_path / "circle-2.jpg") as image:
        assert image.format == "JPEG"


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    done = run("generate", "x", *QUICK, "-o", str(tmp_path / "taken.png"))
    assert done.returncode == 2


def test_an_interrupt_ends_with_130_and_one_line(tmp_path: Path) -> None:
    command = [*SDBENTO, "generate", "x", *SHAPES, "--steps", "150", "--num-images", "16"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # Shells make background processes ignore SIGINT, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(4)  # in the middle of its work, or while it starts
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.strip()) == (130, "sdbento: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_models_are_listed() -> None:
    done = run("models")
    assert done.returncode == 0
    assert "shapes" in done.stdout
    assert "stable-diffusion-xl-base-1.0" in done.stdout


def test_samplers_are_listed(called: Callable[..., tuple[int, str, str]]) -> None:
    status, printed, _ = called("samplers")
    assert status == 0
    assert re.search(r"^DPM\+\+ 2M +normal, karras", printed, re.MULTILINE)


def test_the_doctor_examines_everything() -> None:
    done = run("doctor", SDBENTO_DEVICE="cpu", SDBENTO_MEMROY_GB="1", MAX_BATCH_SIZE="2")
    assert done.returncode == 0, done.stderr
    for subject in ("Python", "packages", "CPU", "memory", "GPU", "disk", "Hub", "port", "models"):
        assert re.search(rf"^(ok|--|NO)  ?{subject} ", done.stdout, re.MULTILINE), subject
    assert "MAX_BATCH_SIZE=2 (default 4)" in done.stdout
    assert "SDBENTO_MEMROY_GB is set, but no setting has that name" in done.stdout
    assert "PRECISION=fp16 cannot be honoured on a CPU" in done.stdout


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = complaint("serve", *SHAPES, "--port", str(port))
        assert text == f"cannot listen on 127.0.0.1:{port}: address already in use"


def test_a_port_for_health_that_is_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        health = taken.getsockname()[1]
        port = str(free_port())
        text = complaint("serve", *SHAPES, "--port", port, PORT_HEALTH=str(health))
        assert text == f"cannot listen on PORT_HEALTH={health}: address already in use"


def test_a_model_on_a_volume_is_served_and_sigterm_ends_it(tmp_path: Path) -> None:
    volume, folder, port = tmp_path / "volume", tmp_path / "folder", free_port()
    folder.mkdir()
    (volume / "models").mkdir(parents=True)
    (volume / "models" / "mine").symlink_to(ROOT / "sdbento/bundled/shapes")
    command = [*SDBENTO, "serve", "--model", "mine", "--port", str(port)]
    # A health port equal to the server's own port needs no second listener.
    environment = os.environ | {"SDBENTO_RUNPOD_VOLUME": str(volume), "PORT_HEALTH": str(port)}
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/readyz", process)
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0
    assert [path.name for path in folder.iterdir()] == ["state"]  # of the jobs


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(900):
        with suppress(httpx.TransportError):
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        assert process.poll() is None, "the server ended"
        time.sleep(0.1)
    pytest.fail("the server did not get ready")
