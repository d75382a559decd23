"""Doors served without BentoML and without a model: behind the Guard, on a port of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import APIRouter

from sdbento.app import App
from sdbento.doors.error_shape import ErrorShape
from sdbento.doors.http.guard import Guard
from sdbento.doors.http.routing import mounted
from sdbento.settings import Settings
from tests.support.fakes import FakeRunner
from tests.support.server import free_port

SOON = 30.0


class FakeServer:
    """An App whose images are one pixel large, its runner, and a client of its doors."""

    def __init__(self, app: App, runner: FakeRunner, url: str) -> None:
        self.app = app
        self.runner = runner
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=SOON, trust_env=False)


@contextmanager
def fake_server(
    *doors: APIRouter,
    error_shapes: Mapping[str, ErrorShape],
    settings: Settings,
    seconds: float = 0.0,
) -> Iterator[FakeServer]:
    """`seconds`: that a step takes."""
    routes, runner = mounted(*doors), FakeRunner(seconds=seconds)
    app = routes.state.app = App(settings, runner)
    app.start()
    port = free_port()
    guarded = Guard(routes, lambda: settings, {}, error_shapes)
    server = uvicorn.Server(uvicorn.Config(guarded, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    give_up = time.monotonic() + SOON
    while not server.started:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    fake = FakeServer(app, runner, f"http://127.0.0.1:{port}")
    try:
        yield fake
    finally:
        fake.client.close()
        server.should_exit = True
        thread.join()
        app.close()
