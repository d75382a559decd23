"""GET and POST options: each caller's model, over restarts and damage."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from sdbento.app import App
from sdbento.doors.a1111 import generation
from sdbento.doors.a1111.failures import ERRORS
from sdbento.doors.a1111.tools import choices, options
from sdbento.doors.a1111.tools.options import FILE
from sdbento.settings import Settings
from tests.support.a1111 import assert_failed, caller, serving_a1111
from tests.support.fake_server import fake_server
from tests.support.local import local
from tests.support.tiny import save_tiny

OPTIONS = "/sdapi/v1/options"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with serving_a1111(tmp_path) as client:
        yield client


def app_of(client: TestClient) -> App:
    app: App = client.app_state["app"]
    return app


def current(client: TestClient, name: str = "") -> Any:
    return client.get(OPTIONS, headers=caller(name)).json()["sd_model_checkpoint"]


def choose(client: TestClient, title: Any, name: str = "") -> Any:
    return client.post(OPTIONS, json={"sd_model_checkpoint": title}, headers=caller(name))


def test_what_clients_read(client: TestClient) -> None:
    told = client.get(OPTIONS).json()
    assert told["sd_model_checkpoint"] == "shapes"
    assert told["sd_vae"] == "Automatic"
    assert told["samples_format"] == "png"
    assert told["CLIP_stop_at_last_layers"] == 1
    assert "forge_preset" not in told  # by which SillyTavern tells Forge


def test_an_alias_as_the_default_has_the_title_of_the_list(tmp_path: Path) -> None:
    with serving_a1111(tmp_path, sd_model="sdxl") as client:
        assert current(client) == SDXL


def test_a_key_learns_of_no_model_that_it_may_not_use(tmp_path: Path) -> None:
    secret = save_tiny("sd15", tmp_path / "private" / "secret")
    with serving_a1111(tmp_path, sd_model=str(secret)) as client:
        assert current(client) == "secret"
        assert current(client, "limited") is None
        refused = choose(client, "Secret.safetensors", "limited")
        assert_failed(refused, 403, "this key does not allow the model 'Secret.safetensors'")
        assert choose(client, "shapes", "limited").status_code == 200
        assert current(client, "limited") == "shapes"


@pytest.mark.parametrize(
    "title",
    [
        "runwayml/stable-diffusion-v1-5",
        "stable-diffusion-v1-5",
        "Stable-Diffusion-V1-5.safetensors [6ce0161689]",
        "stable-diffusion-v1-5.ckpt",
        "sd15",
    ],
)
def test_a_model_by_every_name_it_may_have(client: TestClient, title: str) -> None:
    response = choose(client, title)
    assert (response.status_code, response.json()) == (200, None)
    assert current(client) == "runwayml/stable-diffusion-v1-5"


def test_the_whole_object_comes_back_from_open_webui(client: TestClient) -> None:
    whole = client.get(OPTIONS).json() | {"sd_model_checkpoint": SDXL, "no_such_option": [1]}
    assert client.post(OPTIONS, json=whole).status_code == 200
    assert current(client) == SDXL
    assert client.post(OPTIONS, json=client.get(OPTIONS).json()).status_code == 200


@pytest.mark.parametrize("title", [None, ""])
def test_no_title_changes_nothing(client: TestClient, title: Any) -> None:
    choose(client, SDXL)
    assert choose(client, title).status_code == 200
    assert current(client) == SDXL


def test_a_model_that_there_is_not(client: TestClient) -> None:
    assert_failed(choose(client, "no such model"), 404, "no such model")
    assert current(client) == "shapes"


@pytest.mark.parametrize(
    "body",
    [
        [],
        "x",
        1,
        {"sd_model_checkpoint": 5},
        {"sd_model_checkpoint": "x" * 501},
        {"CLIP_stop_at_last_layers": 0},
        {"CLIP_stop_at_last_layers": 14},
        {"CLIP_stop_at_last_layers": "many"},
        {"CLIP_stop_at_last_layers": 1.5},
        {"CLIP_stop_at_last_layers": []},
    ],
)
def test_nonsense_is_refused(client: TestClient, body: Any) -> None:
    response = client.post(OPTIONS, json=body)
    assert_failed(response, 422 if isinstance(body, dict) else 400)


def test_the_last_layers_can_be_left_out(client: TestClient) -> None:
    assert client.post(OPTIONS, json={"CLIP_stop_at_last_layers": "2"}).status_code == 200
    assert client.get(OPTIONS).json()["CLIP_stop_at_last_layers"] == 2
    assert current(client) == "shapes"


def test_each_caller_has_a_choice_of_its_own(client: TestClient) -> None:
    choose(client, SDXL, "alice")
    choose(client, "sd15", "bob")
    assert current(client, "alice") == SDXL
    assert current(client, "bob") == "runwayml/stable-diffusion-v1-5"
    assert current(client) == current(client, "carol") == "shapes"


def test_two_changes_at_once_are_both_kept(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_model, asked, go_on = app_of(client).find_model, threading.Event(), threading.Event()

    async def find_slowly(name: str | None = None) -> Any:
        asked.set()
        await asyncio.to_thread(go_on.wait, 30)
        return await find_model(name)

    monkeypatch.setattr(app_of(client), "find_model", find_slowly)
    with ThreadPoolExecutor(1) as pool:
        choosing = pool.submit(choose, client, SDXL)
        assert asked.wait(30)
        client.post(OPTIONS, json={"CLIP_stop_at_last_layers": 2})
        go_on.set()
        assert choosing.result().status_code == 200
    assert client.get(OPTIONS).json()["CLIP_stop_at_last_layers"] == 2
    assert current(client) == SDXL


def test_a_key_chooses_only_what_it_allows(client: TestClient) -> None:
    assert_failed(choose(client, SDXL, "limited"), 403, SDXL)
    assert current(client, "limited") == "shapes"
    models = client.get("/sdapi/v1/sd-models", headers=caller("limited")).json()
    assert [model["title"] for model in models] == ["shapes"]
    assert local(app_of(client)).pipelines.loaded() == []


def test_images_are_made_by_the_callers_choice(tmp_path: Path) -> None:
    save_tiny("sd15", tmp_path / "models" / "mine")
    settings = Settings(
        sd_model="shapes", models_dir=tmp_path / "models", state_dir=tmp_path / "state"
    )
    body = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64}
    override = {"override_settings": {"sd_model_checkpoint": "shapes"}, "clip_skip": 1}
    doors = generation.router, options.router
    with fake_server(*doors, error_shapes={"/sdapi/": ERRORS}, settings=settings) as fake:

        def made(**fields: Any) -> tuple[str, int]:
            answer = fake.client.post("/sdapi/v1/txt2img", json=body | fields).json()
            info = json.loads(answer["info"])
            return info["sd_model_name"], info["clip_skip"]

        assert made() == ("shapes", 1)
        chosen = {"sd_model_checkpoint": "mine", "CLIP_stop_at_last_layers": 2}
        fake.client.post(OPTIONS, json=chosen)
        assert made() == ("mine", 2)
        assert made(**override) == ("shapes", 1)


def test_choices_outlive_the_server(tmp_path: Path) -> None:
    with serving_a1111(tmp_path) as client:
        choose(client, SDXL, "alice")
        choose(client, "sd15")
    with serving_a1111(tmp_path) as client:
        assert current(client, "alice") == SDXL
        assert current(client) == "runwayml/stable-diffusion-v1-5"


def test_clients_without_keys_choose_for_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "MAX_CHOICES", 3)

    def at(address: str) -> dict[str, str]:
        return {"X-Address": address}

    def seen(client: TestClient, address: str) -> Any:
        return client.get(OPTIONS, headers=at(address)).json()["sd_model_checkpoint"]

    with serving_a1111(tmp_path) as client:
        for address in ("192.0.2.1", "192.0.2.2"):
            client.post(OPTIONS, json={"sd_model_checkpoint": SDXL}, headers=at(address))
            assert seen(client, address) == SDXL
            assert [seen(client, "192.0.2.9"), current(client)] == ["shapes", "shapes"]
        for number in range(2):
            changes = {"CLIP_stop_at_last_layers": 2}
            client.post(OPTIONS, json=changes, headers=at(f"198.51.100.{number}"))
    with serving_a1111(tmp_path) as client:
        assert [seen(client, "192.0.2.1"), seen(client, "192.0.2.2")] == ["shapes", SDXL]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"": 5}', b"\xff\xfe", b"null"])
def test_a_damaged_file_is_told_and_ignored(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "state" / FILE
    file.parent.mkdir()
    file.write_bytes(damage)
    with serving_a1111(tmp_path) as client:
        assert current(client) == "shapes"
        assert str(file) in caplog.text
        choose(client, SDXL)
    with serving_a1111(tmp_path) as client:
        assert current(client) == SDXL


def test_a_choice_that_cannot_be_written_holds_until_the_server_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("in the way of the folder")
    with serving_a1111(tmp_path) as client:
        assert choose(client, SDXL).status_code == 200
        assert current(client) == SDXL
    assert "is lost when we stop" in caplog.text


def test_no_folder_of_this_machine_is_told(tmp_path: Path) -> None:
    default = save_tiny("sd15", tmp_path / "private" / "default")
    save_tiny("sd15", tmp_path / "models_dir" / "mine")
    with serving_a1111(tmp_path, sd_model=str(default)) as client:
        assert current(client) == "default"
        choose(client, "mine")
        assert current(client) == "mine"
        assert choose(client, "default").status_code == 200
        assert current(client) == "default"
        assert "private" not in client.get("/sdapi/v1/sd-models").text


def until_loaded(client: TestClient, name: str) -> None:
    give_up = time.monotonic() + 30
    while name not in [
        key for key, _, leased in local(app_of(client)).pipelines.loaded() if not leased
    ]:
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_the_chosen_model_is_loaded_in_the_background(tmp_path: Path) -> None:
    save_tiny("sd15", tmp_path / "models_dir" / "mine")
    with serving_a1111(tmp_path) as client:
        choose(client, "mine")
        until_loaded(client, "mine")
        assert client.post("/sdapi/v1/reload-checkpoint").json() == {}
        assert "nothing was unloaded" in client.post("/sdapi/v1/unload-checkpoint").text
        assert [key for key, *_ in local(app_of(client)).pipelines.loaded()] == ["mine"]


def test_a_load_that_fails_is_no_failure_of_the_choice(client: TestClient) -> None:
    assert choose(client, SDXL).status_code == 200  # it is not on this machine
    assert current(client) == SDXL
