"""GET /ping: the status that the load balancer gets, on the server's port or a port of its own."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from sdbento.doors.http import ping
from sdbento.doors.http.routing import mounted
from sdbento.environment import load_settings
from sdbento.settings import SettingsError
from tests.support.server import free_port


@dataclass
class FakeApp:
    alive: bool = True
    ready: bool = False


def test_ping_distinguishes_loading_ready_and_broken() -> None:
    app = FakeApp()
    routes = mounted(ping.router)
    routes.state.app = app
    client = TestClient(routes)

    assert (client.get("/ping").status_code, client.get("/ping").content) == (204, b"")
    app.ready = True
    assert client.get("/ping").status_code == 200
    app.ready, app.alive = False, False
    assert client.get("/ping").status_code == 503


def test_a_port_of_its_own_answers_ping_and_nothing_else() -> None:
    app: Any = FakeApp()
    port = free_port()
    listener = ping.listen(app, load_settings(port=3000, port_health=port))
    assert listener is not None
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        assert client.get("/ping").status_code == 204
        app.ready = True
        assert client.get("/ping?from=balancer").status_code == 200
        assert client.get("/generate").status_code == 404
        assert client.post("/ping").status_code == 405
        listener.close()
        with pytest.raises(httpx.TransportError):
            client.get("/ping")


def test_nobody_can_take_all_connections_of_that_port() -> None:
    app: Any = FakeApp()
    port = free_port()
    listener = ping.listen(app, load_settings(port=3000, port_health=port))
    assert listener is not None
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(150)]
    assert httpx.get(f"http://127.0.0.1:{port}/ping", trust_env=False).status_code == 204
    held[0].settimeout(30)
    assert held[0].recv(1) == b""  # the oldest made room
    for client in held:
        client.close()
    listener.close()


@pytest.mark.parametrize("ports", [{}, {"port": 80}, {"port": 80, "port_health": 80}])
def test_the_servers_own_port_needs_no_second_listener(ports: dict[str, int]) -> None:
    app: Any = FakeApp()
    assert ping.listen(app, load_settings(**ports)) is None


def test_a_port_that_is_taken_is_one_clear_line() -> None:
    app: Any = FakeApp()
    port = free_port()
    listener = ping.listen(app, load_settings(port_health=port))
    assert listener is not None
    with pytest.raises(SettingsError, match=f"PORT_HEALTH={port}: cannot listen there"):
        ping.listen(app, load_settings(port_health=port))
    listener.close()
