"""Jobs that are calls of AUTOMATIC1111's API, answered by its own door."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import pkgutil
from typing import Any

import pytest

from sdbento.app import App
from sdbento.doors import a1111
from sdbento.doors.a1111.every import ROUTERS
from sdbento.doors.runpod.a1111_calls import answer, routes_on
from sdbento.errors import NotFound, SDBentoError
from sdbento.jobs.formats.a1111 import Call
from sdbento.settings import Settings
from tests.support.fakes import FakeRunner
from tests.support.job_server import until
from tests.support.local import local
from tests.support.server import QUICK, Server, alike, generated, pixels

BODY: dict[str, Any] = {"prompt": "a red circle", "steps": 4, "width": 64, "height": 64, "seed": 7}


@pytest.fixture
def app() -> Any:
    app = App(Settings(sd_model="shapes"), FakeRunner())
    app.start()
    yield app
    app.close()


async def answered(app: App, path: str, method: str = "POST", **payload: Any) -> Any:
    return await answer(routes_on(app), Call(method, path, payload))


async def test_txt2img_is_answered_as_over_http(app: App) -> None:
    given = await answered(app, "/sdapi/v1/txt2img", **BODY, cfg_scale=5, batch_size=2)
    assert set(given) == {"images", "parameters", "info"}
    assert len(given["images"]) == 2
    assert json.loads(given["info"])["all_seeds"] == [7, 8]


@pytest.mark.parametrize(
    ("path", "payload", "words"),
    [
        ("/sdapi/v1/txt2img", {"steps": "many"}, "steps"),
        ("/sdapi/v1/txt2img", {**BODY, "sampler_name": "Nothing"}, "Sampler not found"),
        ("/sdapi/v1/txt2img", {**BODY, "width": 10**9}, "width"),
        ("/sdapi/v1/txt2img", {**BODY, "prompt": ["x"]}, "prompt"),
        ("/sdapi/v1/img2img", BODY, "Init image not found"),
        ("/sdapi/v1/img2img", {**BODY, "init_images": ["!!"]}, "image must be"),
    ],
)
async def test_what_the_door_refuses_fails_the_job(
    app: App, path: str, payload: dict[str, Any], words: str
) -> None:
    with pytest.raises(SDBentoError) as caught:
        await answered(app, path, **payload)
    assert caught.value.status < 500
    assert words.casefold() in caught.value.message.casefold()


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/sdapi/v1/txt2img"), ("POST", "/sdapi/v1/nothing"), ("GET", "/sdapi/v1/run")],
)
async def test_a_route_that_is_not_there_is_said(app: App, method: str, path: str) -> None:
    with pytest.raises(NotFound, match=f"there is no {method} {path} here"):
        await answered(app, path, method)


@pytest.mark.parametrize("path", ["samplers", "schedulers", "sd-models", "options", "cmd-flags"])
async def test_what_is_listed_can_be_asked_for(app: App, path: str) -> None:
    assert await answered(app, f"/sdapi/v1/{path}", "GET")


async def test_a_route_that_is_not_done_here_says_so(app: App) -> None:
    with pytest.raises(SDBentoError, match="describing an image is not offered"):
        await answered(app, "/sdapi/v1/interrogate", image="AAAA")


async def test_a_call_that_is_cancelled_stops_its_work(app: App) -> None:
    runner: Any = local(app).runner
    runner.seconds = 0.02
    task = asyncio.create_task(answered(app, "/sdapi/v1/txt2img", **{**BODY, "steps": 150}))
    await until(lambda: app.num_requests == 1)
    task.cancel()
    await until(lambda: app.num_requests == 0)
    assert task.cancelled()


def test_every_route_of_that_door_can_be_called() -> None:
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(a1111.__path__, f"{a1111.__name__}.")
    ]
    routers = [module.router for module in modules if hasattr(module, "router")]
    assert routers
    assert [router for router in routers if router not in ROUTERS] == []


@pytest.mark.parametrize("named", [True, False])
def test_a_job_makes_the_picture_of_generate(server: Server, named: bool) -> None:
    body = {"prompt": QUICK["prompt"], "steps": 5, "cfg_scale": 6.5, "seed": 11, "width": 128}
    body |= {"height": 128, "sampler_name": "DPM++ 2M Karras"}
    api = {"method": "POST", "endpoint": "/sdapi/v1/txt2img"}
    given = {"api": api, "payload": body} if named else body
    job = server.client.post("/runsync", json={"input": given}).json()
    assert job["status"] == "COMPLETED"
    [drawn] = job["output"]["images"]
    ours = {"num_inference_steps": 5, "guidance_scale": 6.5, "scheduler": "DPM++ 2M Karras"}
    same = {name: body[name] for name in ("prompt", "seed", "width", "height")}
    [expected] = generated(server, **ours, **same)
    assert alike(pixels(base64.b64decode(drawn)), expected)


def test_a_job_that_the_door_refuses_has_one_line(server: Server) -> None:
    job = server.client.post("/runsync", json={"input": {**BODY, "steps": "many"}}).json()
    assert job["status"] == "FAILED"
    assert "steps" in job["error"] and "\n" not in job["error"]
