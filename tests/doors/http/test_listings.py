"""GET /models and GET /samplers: the JSON of what can be named in a request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from sdbento.app import App
from sdbento.doors.http import listings
from sdbento.doors.http.routing import mounted
from sdbento.environment import load_settings


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = App(load_settings(sd_model="shapes"))
    routes = mounted(listings.router)
    routes.state.app = app
    yield TestClient(routes)
    app.close()


def test_models_are_listed_with_their_defaults(client: TestClient) -> None:
    models = client.get("/models").json()["models"]
    assert [model["name"] for model in models if model["default"]] == ["shapes"]
    shapes = next(model for model in models if model["name"] == "shapes")
    assert list(shapes.items()) == [
        ("name", "shapes"),
        ("family", "sd15"),
        ("width", 128),
        ("height", 128),
        ("num_inference_steps", 20),
        ("guidance_scale", 4.0),
        ("scheduler", None),
        ("memory_gb", 0.1),
        ("inpaints", False),
        ("refines", False),
        ("loaded", False),
        ("attention", None),
        ("devices", []),
        ("default", True),
    ]


def test_samplers_are_listed(client: TestClient) -> None:
    samplers = client.get("/samplers").json()["samplers"]
    assert list(samplers[0].items()) == [
        ("name", "DDIM"),
        ("aliases", ["DDIMScheduler"]),
        ("scheduler", "DDIMScheduler"),
        ("sigmas", ["normal"]),
        ("stochastic", False),
    ]
