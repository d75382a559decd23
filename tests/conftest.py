"""Shared by all tests: no network, default settings, no tracking."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

from sdbento.settings import Settings
from tests.support import postgres
from tests.support.listener import Listener, listening
from tests.support.server import Server, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Read when the libraries are imported, here and in the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["BENTOML_DO_NOT_TRACK"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads would only wait for each other

# The same examples in every run, and no failure for a machine that is busy.
hypothesis.settings.register_profile(
    "sdbento",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("sdbento")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that no process is left with one at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/serving", "tests/doors/runpod")))


SETTINGS = ["SDBENTO_CONFIG", *(variable for variable, *_ in Settings.variables())]


@pytest.fixture(autouse=True, scope="session")
def _own_bentoml_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["BENTOML_HOME"] = str(tmp_path_factory.mktemp("bentoml"))


@pytest.fixture(autouse=True)
def _default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests start from the defaults, whatever the developer has set."""
    for variable in SETTINGS:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """A command that keeps quiet, run in this process, leaves later tests their log."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on `shapes`, for all tests that only send requests to it."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, SDBENTO_ALLOW_PRIVATE_URLS="true") as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from tests.support.browser import browsing  # other tests need no Playwright

    with browsing() as browser:
        yield browser


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    if not postgres.is_installed():
        pytest.skip("the machine has no PostgreSQL (initdb, pg_ctl, postgres)")
    with postgres.postgres() as address:
        yield address


@pytest.fixture
def listener() -> Iterator[Listener]:
    with listening() as listener:
        yield listener
