"""AUTOMATIC1111's routes without a server, on an App whose runner is a fake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from sdbento.access.caller import Allowance, Caller, acting_for
from sdbento.app import App
from sdbento.doors.a1111.failures import ERRORS
from sdbento.doors.a1111.tools import controlnet, extras, listings, machine, options, png_info
from sdbento.doors.http.guard import Guard
from sdbento.doors.http.routing import mounted
from sdbento.settings import Settings
from tests.support.fakes import FakeRunner

DOORS = (options, listings, machine, extras, png_info, controlnet)


@contextmanager
def serving_a1111(folder: Path, **settings: Any) -> Iterator[TestClient]:
    """All routes but those that make images; the files of the settings lie in `folder`."""
    places = {name: folder / name for name in ("models_dir", "lora_dir", "embeddings_dir")}
    chosen = Settings(**{"sd_model": "shapes", "state_dir": folder / "state", **places, **settings})
    routes = mounted(*(door.router for door in DOORS))
    app = routes.state.app = App(chosen, FakeRunner())

    async def on_behalf(scope: Scope, receive: Receive, send: Send) -> None:
        """Of whom the header says, as if it were a key; that of "limited" allows one model."""
        name = Headers(scope=scope).get("x-caller")
        models = frozenset({"shapes"}) if name == "limited" else None
        address = Headers(scope=scope).get("x-address")
        with acting_for(Caller(name, Allowance(models=models), address=address)):
            await routes(scope, receive, send)

    shapes = {"/sdapi/": ERRORS, "/controlnet/": ERRORS}
    client = TestClient(Guard(on_behalf, lambda: chosen, {}, shapes))
    client.app_state["app"] = app
    try:
        yield client
    finally:
        app.close(0)


def caller(name: str) -> dict[str, str]:
    """The headers of a request of that caller."""
    return {"X-Caller": name}


def assert_failed(response: Any, status: int, *words: str) -> None:
    """The shape of the web UI's errors."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error", "detail", "body", "errors"}
    for word in words:
        assert word in body["detail"]
