"""`sdbento top`: what it shows of a batch, and of a real server."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from sdbento.doors.cli.top import picture, top
from sdbento.live.batch import (
    Batch,
    BatchImage,
    BatchRequest,
    Lane,
    Queue,
    Recent,
    ResidentModel,
)
from tests.support.server import QUICK, Server, post

URL = "http://localhost:3000"
SDBENTO = [sys.executable, "-m", "sdbento"]
IDLE = Batch(1, 0.0, 0, None, Queue(0, 0, 0, 0, 0.0), (), (), (), ())
OWN = BatchRequest(3, True, "a red\ncircle", "Euler a", ("ink",), 1, 1, 2, 0, 0, 1.0, 75.0)
OTHER = BatchRequest(4, False, None, "DDIM", (), 2, 0, 1, 0, 0, 1.0, None)
LATE = BatchRequest(5, True, "a cat", None, (), 0, 0, 4, 4, 0, 2.5, 9.0)
BUSY = Batch(
    number=9,
    time=0.0,
    calls=20,
    recent=Recent(20, 5.5, 2.9, 0.0123),
    queue=Queue(2, 3, 7, 4, 12.0),
    lanes=(
        Lane(
            *("shapes", 512, 768, 1, 0.0, 5, 0.0456, True),
            images=(
                BatchImage(3, 0, 10, 20, 2, False),
                BatchImage(3, 1, 5, 20, 2, False),
                BatchImage(4, 0, 7, 8, 1, True),
            ),
        ),
        Lane(None, 64, 64, 1, 0.0, None, None, False, (BatchImage(4, 0, 8, 8, 0, False),)),
    ),
    requests=(OWN, OTHER, LATE),
    left=(),
    models=(ResidentModel("shapes", "model", 0.012), ResidentModel(None, "controlnet", 1.5)),
)


def shown(batch: Batch) -> list[str]:
    console = Console(width=120, no_color=True)
    with console.capture() as captured:
        console.print(picture(batch, URL))
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def test_a_busy_server() -> None:
    lines = shown(BUSY)
    assert lines[:4] == [
        f"sdbento {URL}",
        "Queue: 3 requests, 7 images, 4 of them not begun; 2 more are being prepared; "
        "all done in 12.0 s",
        "Calls: 12 ms each, with 5.5 rows of 2.9 images, in the last 20",
        "Memory: shapes 0.01 GB, another 1.50 GB",
    ]
    quarter, half = "█" * 5 + "░" * 15, "█" * 10 + "░" * 10
    most, whole = "█" * 17 + "░" * 3, "█" * 20
    assert lines[4:] == [
        "",
        "shapes 512x768, 5 rows in 46 ms",
        "no. request made with step done in",
        f"3.1 a red circle Euler a + ink + 1 ControlNet {half} 10/20 1 min 15 s",
        f"3.2 a red circle Euler a + ink + 1 ControlNet {quarter} 5/20 1 min 15 s",
        f"4 another's DDIM + 2 LoRAs {most} 7/8",
        "",
        "another model 64x64",
        "no. request made with step done in",
        f"4 another's DDIM + 2 LoRAs {whole} 8/8 decoding",
        "",
        "Waiting",
        "no. request made with waits done in",
        "5 a cat 4 images 2.5 s 9.0 s",
    ]


@pytest.mark.parametrize(("step", "state"), [(10, "paused"), (0, "begins")])
def test_who_takes_no_part_waits(step: int, state: str) -> None:
    image = BatchImage(3, 0, step, 20, 0, False)
    lanes = (replace(BUSY.lanes[0], images=(image,)),)
    assert state in shown(replace(BUSY, lanes=lanes))[7]


def test_an_idle_server() -> None:
    assert shown(IDLE) == [
        f"sdbento {URL}",
        "Queue: nothing to do",
        "Calls: none of late",
        "Memory: no model",
    ]


def test_once_it_prints_what_runs(server: Server) -> None:
    result = CliRunner().invoke(top, ["--url", server.url, "--once"])
    assert result.exit_code == 0
    assert re.search(r"^Memory: .*\bshapes 0\.01 GB", result.stdout, re.MULTILINE)


def test_a_server_that_is_not_there_ends_it() -> None:
    result = CliRunner().invoke(top, ["--url", "http://localhost:1"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: there is no server at http://localhost:1: ConnectError")
    assert result.output.count("\n") == 1


class Terminal:
    """`sdbento top` in a terminal of its own; `text` is what it has written there."""

    def __init__(self, *args: str) -> None:
        self.text = ""
        self._end, other = pty.openpty()
        size = {"COLUMNS": "120", "LINES": "40", "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            [*SDBENTO, "top", *args],
            stdin=other,
            stdout=other,
            stderr=other,
            env=os.environ | size,
        )
        os.close(other)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # which is how the end of a terminal reads
            while data := os.read(self._end, 65536):
                self.text += data.decode(errors="replace")

    def wait_for(self, text: str) -> None:
        give_up = time.monotonic() + 60
        while text not in self.text:
            assert time.monotonic() < give_up and self.process.poll() is None, self.text
            time.sleep(0.02)

    def end(self) -> int:
        """Ctrl+C; the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        os.close(self._end)


def test_in_a_terminal_it_follows_the_batch_until_ctrl_c(server: Server) -> None:
    fields: dict[str, Any] = {**QUICK, "num_inference_steps": 100, "width": 128, "height": 128}
    with closing(Terminal("--url", server.url)) as terminal:
        terminal.wait_for("Queue:")
        answered = threading.Thread(target=post, args=(server,), kwargs=fields)
        answered.start()
        terminal.wait_for("a red circle on")
        terminal.wait_for("/100")
        answered.join(60)
        assert terminal.end() == 0
    assert "Traceback" not in terminal.text
    assert terminal.text.rstrip().endswith("\x1b[?1049l")  # the screen is as it was
