"""What a middleware that counts paths gets to see."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from sdbento.doors.bentoml.labels import OTHERS, RouteLabels
from sdbento.doors.http import listings
from sdbento.doors.openai import api as openai_api
from sdbento.doors.runpod import api as runpod_api

LABELS = RouteLabels([listings.router, openai_api.router, runpod_api.router], ["/generate"])


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/generate", "/generate"),
        ("/livez", "/livez"),
        ("/models", "/models"),
        ("/models/", "/models"),
        ("/", "/"),
        ("/status/0c1a-secret", "/status/{id}"),
        ("/v2/mine/cancel/0c1a-secret", "/v2/{endpoint_id}/cancel/{id}"),
        ("/v1/images/files/secret.png", "/v1/images/files/{name}"),
        ("/nothing/secret", OTHERS),
        ("/status/0c1a-secret/more", OTHERS),
        ("//generate", OTHERS),
        ("", OTHERS),
    ],
)
async def test_paths_are_called_by_their_routes(path: str, label: str) -> None:
    seen: list[str] = []

    def counting(app: ASGIApp, **options: int) -> ASGIApp:
        async def count(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope["path"])
            await app(scope, receive, send)

        assert options == {"limit": 3}
        return count

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        scope["noted"] = True

    async def nothing(*_: Any) -> Any:
        pytest.fail("it was read or answered")

    scope = {"type": "http", "path": path}
    await LABELS.around(counting)(app, limit=3)(scope, nothing, nothing)
    assert seen == [label, path]
    assert scope["noted"]  # the application has the scope itself


async def test_the_lifespan_passes() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def nothing(*_: Any) -> Any:
        pytest.fail("it was read or answered")

    scope = {"type": "lifespan"}
    await LABELS.around(lambda app: app)(app)(scope, nothing, nothing)
    assert seen == [scope]
