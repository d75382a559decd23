"""The routes of this door before an App whose images are one pixel, made in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.testclient import TestClient

from sdbento.app import App
from sdbento.doors.http.guard import Guard
from sdbento.doors.http.routing import mounted
from sdbento.doors.openai import api, models
from sdbento.doors.openai.failures import ERRORS
from sdbento.doors.openai.files import PUBLIC_PREFIX
from sdbento.settings import Settings
from tests.support.fakes import FakeRunner

Serve = Callable[..., TestClient]


@pytest.fixture(scope="package")
def serve() -> Iterator[Serve]:
    """Clients of servers with the given settings, and `runner` if it is given."""
    with ExitStack() as stack:

        def serve(runner: FakeRunner | None = None, **options: Any) -> TestClient:
            settings = Settings.model_validate({"sd_model": "shapes", "offline": True} | options)
            routes = mounted(api.router, models.router)
            app = routes.state.app = App(settings, runner or FakeRunner())
            app.start()
            stack.callback(app.close)
            shapes = {"/v1/": ERRORS}
            guarded = Guard(routes, lambda: settings, {}, shapes, (PUBLIC_PREFIX,))
            return stack.enter_context(TestClient(guarded))

        yield serve


@pytest.fixture(scope="package")
def client(serve: Serve) -> TestClient:
    return serve()
