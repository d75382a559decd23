"""Which model answers where nobody has named one: the same for every way to start a server."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sdbento.doors import default_model
from sdbento.doors.cli.commands import with_told_default_model
from sdbento.doors.default_model import reason, with_default_model
from sdbento.environment import load_settings
from sdbento.settings import Settings
from tests.support.server import ROOT

SDXL = Settings().sd_model


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "GPU_DRIVERS", ("/dev/nul?",))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


def test_a_model_that_is_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_MODEL", "mine")
    assert with_default_model(load_settings(device="cpu")).sd_model == "mine"
    assert with_default_model(load_settings(device="cpu", sd_model="x")).sd_model == "x"
    assert reason(load_settings(device="cpu")) == "SD_MODEL names it"


def test_without_a_gpu_it_is_the_embedded_model() -> None:
    settings = load_settings(device="cpu")
    assert with_default_model(settings).sd_model == "emoji"
    assert "no GPU" in reason(settings)


@pytest.mark.usefixtures("gpu")
def test_with_a_gpu_it_is_that_of_the_runpod_worker() -> None:
    settings = load_settings()
    assert with_default_model(settings) is settings and settings.sd_model == SDXL
    assert "there is a GPU" in reason(settings)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_is_not_to_be_used_does_not_count() -> None:
    assert with_default_model(load_settings(device="cpu")).sd_model == "emoji"


def test_a_decision_holds_for_the_process_that_is_started_with_it() -> None:
    decided = with_default_model(load_settings(device="cpu"))
    assert with_default_model(decided) is decided
    assert reason(decided) == "SD_MODEL names it"


def test_without_a_driver_torch_is_not_asked_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "GPU_DRIVERS", ("/dev/no-such-gpu*",))
    monkeypatch.setattr("torch.cuda.is_available", lambda: pytest.fail("asked"))
    assert not default_model.has_gpu(load_settings())


def test_the_command_line_says_in_one_line_that_it_took_the_embedded_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_told_default_model(load_settings(device="cpu"))
    assert capsys.readouterr().err.count("\n") == 1
    with_told_default_model(load_settings(device="cpu", sd_model="x"))
    assert not capsys.readouterr().err


def test_make_serve_leaves_the_decision_to_sdbento_serve() -> None:
    command = ["make", "--dry-run", "serve", "PORT=4000", "PYTHON=" + sys.executable]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    [serve] = [line for line in printed.splitlines() if "sdbento serve" in line]
    assert serve == "exec .venv/bin/sdbento serve --port '4000' "


# The service as `bentoml serve` makes it, with something that only prints in place of the engine.
SERVICE = """
import sdbento.app, service
sdbento.app.App = lambda settings, on_broken: exit(f"the default is {settings.sd_model}")
service.StableDiffusion.inner()
"""


def test_bentoml_serve_follows_the_same_rule() -> None:
    command = [sys.executable, "-W", "ignore", "-c", SERVICE]
    environment = os.environ | {"SDBENTO_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "the default is emoji"
