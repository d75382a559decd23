"""A real server with keys: public clients that have one, and two users who attack each other."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import runpod
import webuiapi
from playwright.sync_api import Browser

from sdbento.access import entries
from sdbento.client import Client
from sdbento.doors.web.page import FILES
from sdbento.errors import Forbidden, NotFound, Unauthorized
from tests.support.browser import profile
from tests.support.server import QUICK, Server, serving

LONG = {**QUICK, "num_inference_steps": 150, "num_images": 16}
SOON = 60.0


@dataclass
class Guarded:
    """A server with keys: the single one, alice's and bob's."""

    server: Server
    alice: str
    bob: str
    single: str = "sesame"

    def client(self, key: str | None, **options: Any) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(
            base_url=self.server.url, headers=headers, timeout=120, trust_env=False, **options
        )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    file = folder / "keys.yaml"
    alice, bob = entries.add(file, "alice"), entries.add(file, "bob", models=["shapes"])
    assert alice is not None and bob is not None
    with serving(folder, SDBENTO_API_KEYS=str(file), SDBENTO_API_KEY="sesame") as server:
        server.wait_until_ready()
        yield Guarded(server, alice, bob)
        log = server.log.read_text()
        assert not [key for key in (alice, bob, "sesame") if key in log]


def until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of importing BentoML
def test_bentoml_serve_listens_on_loopback_unless_an_address_is_named() -> None:
    from service import StableDiffusion

    assert str(StableDiffusion.config["http"]["host"]) == "127.0.0.1"  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of importing BentoML
def test_bentocloud_is_told_what_the_document_says() -> None:
    from service import StableDiffusion

    config: Any = StableDiffusion.config  # type: ignore[attr-defined]
    assert config["workers"] == 1
    assert config["resources"]["gpu"] == 1
    assert config["resources"]["gpu_type"] == "nvidia-l4"
    assert config["traffic"]["concurrency"] == 8


# Clients


def test_openais_client_uses_its_key(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(api_key=key, base_url=f"{guarded.server.url}/v1")

    alice, bob = client(guarded.alice), client(guarded.bob)
    answer = alice.images.generate(prompt="a red circle", response_format="url")
    assert answer.data is not None
    address = answer.data[0].url
    assert address is not None
    image = httpx.get(address, trust_env=False)  # a browser has no key
    assert (image.status_code, image.headers["content-type"]) == (200, "image/png")
    with pytest.raises(openai.AuthenticationError):
        client("wrong").models.list()
    assert [model.id for model in bob.models.list()] == ["shapes"]
    with pytest.raises(openai.PermissionDeniedError):
        bob.images.generate(prompt="x", model="stabilityai/sd-turbo")


def test_our_own_client_uses_its_key(guarded: Guarded) -> None:
    def client(key: str) -> Client:
        return Client(guarded.server.url, api_key=key, transport=httpx.HTTPTransport())

    with client(guarded.alice) as alice, client(guarded.bob) as bob, client("wrong") as stranger:
        job = alice.jobs.submit("a red circle", num_inference_steps=2)
        with pytest.raises(NotFound):
            bob.jobs.status(job.id)
        assert len(alice.jobs.wait(job.id).images) == 1
        with pytest.raises(Forbidden):
            bob.generate("a red circle", model="stabilityai/sd-turbo")
        with pytest.raises(Unauthorized):
            list(stranger.stream("a red circle"))
        assert stranger.ready()


def test_webuiapi_uses_its_key_as_a_password(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    base = f"{guarded.server.url}/sdapi/v1"
    api = webuiapi.WebUIApi(baseurl=base)
    with pytest.raises(RuntimeError, match="401"):
        api.txt2img(prompt="x", steps=2)
    api.set_auth("anybody", guarded.alice)
    assert api.txt2img(prompt="a red circle", steps=2, width=64, height=64).image.size == (64, 64)


def test_runpods_client_uses_its_key(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod, "endpoint_url_base", f"{guarded.server.url}/v2")
    monkeypatch.setattr(runpod, "api_key", guarded.alice)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    [image] = runpod.Endpoint("any").run_sync({"input": QUICK}, timeout=60)
    assert image


@pytest.mark.parametrize("user", ["", "anybody", "alice"])
def test_basic_is_enough_for_a_browser(guarded: Guarded, user: str) -> None:
    with guarded.client(None, auth=(user, guarded.single)) as http:
        assert http.get("/docs").status_code == 200
        assert http.post("/txt2img", json=QUICK).headers["content-type"] == "image/png"


def test_a_stranger_gets_in_nowhere(guarded: Guarded) -> None:
    with guarded.client(None) as http, guarded.client(guarded.alice) as alice:
        document = alice.get("/docs.json").json()
        asked = 0
        for path, item in document["paths"].items():
            for method in item.keys() & {"get", "post", "put", "delete", "patch"}:
                asked_for = path.replace("{file}", f"{FILES.version}/main.js")
                answer = http.request(method, re.sub(r"\{.*?\}", "x", asked_for))
                opened = path in ("/", "/livez", "/readyz", "/ping")
                opened |= "/images/files/" in path or path.startswith("/web/")
                assert (answer.status_code != 401) == opened, path
                asked += 1
        assert asked > 20
        for path in ("/metrics", "/healthz", "/docs", "/docs.json", "/schema.json"):
            answer = http.get(path)
            assert answer.status_code == 401
            assert len(answer.headers.get_list("www-authenticate")) == 2


def test_a_script_that_has_no_key_makes_no_browser_ask_for_a_password(guarded: Guarded) -> None:
    with guarded.client(None) as http:
        assert http.get("/").status_code == 200
        answer = http.get("/models", headers={"X-Requested-With": "XMLHttpRequest"})
        assert answer.status_code == 401
        assert answer.headers.get_list("www-authenticate") == ['Bearer realm="sdbento"']


def test_the_page_asks_for_the_key_and_keeps_it(guarded: Guarded, browser: Browser) -> None:
    clipboard = ["clipboard-read", "clipboard-write"]
    with profile(browser, guarded.server.url, permissions=clipboard) as context:
        page = context.new_page()
        page.goto("/")
        dialog = page.get_by_role("dialog", name="Key")
        for words, key in [("key is needed", "wrong"), ("was not accepted", guarded.single)]:
            dialog.get_by_text(words).wait_for()
            dialog.get_by_label("Key", exact=True).fill(key)
            dialog.get_by_role("button", name="Use this key").click()
        page.get_by_label("Steps", exact=True).fill("4")
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("article", name="The picture shown").wait_for()
        page.reload()
        page.get_by_role("option", name="shapes", exact=True).wait_for(state="attached")
        assert dialog.is_hidden()
        page.locator("summary", has_text="Copy as").click()
        page.get_by_role("button", name="curl").click()
        page.get_by_text("Copied as curl").wait_for()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert "-H 'Authorization: Bearer KEY'" in copied and guarded.single not in copied


# Two users


def test_what_one_key_makes_the_other_cannot_see_or_touch(guarded: Guarded) -> None:
    with guarded.client(guarded.alice) as alice, guarded.client(guarded.bob) as bob:
        job = alice.post("/run", json={"input": LONG}).json()["id"]
        until(lambda: alice.get("/health").json()["jobs"]["inProgress"] == 1)
        for prefix in ("", "/v2/any"):
            for method, path in [
                ("GET", "status"), ("POST", "status"), ("GET", "status-sync"), ("GET", "stream"),
                ("POST", "stream"), ("POST", "cancel"), ("POST", "retry"),
            ]:  # fmt: skip
                theirs = bob.request(method, f"{prefix}/{path}/{job}")
                nobodys = bob.request(method, f"{prefix}/{path}/{'0' * len(job)}")
                assert theirs.status_code == nobodys.status_code == 404
                assert theirs.text.replace(job, "0" * len(job)) == nobodys.text
        assert bob.post("/purge-queue").json()["removed"] == 0
        health = bob.get("/health").json()
        assert set(health["jobs"].values()) == {0}
        assert health["workers"]["running"] == 0
        bob.post("/sdapi/v1/interrupt")
        assert bob.get("/sdapi/v1/progress").json()["progress"] == 0
        assert alice.get(f"/status/{job}").json()["status"] == "IN_PROGRESS"
        assert alice.post(f"/cancel/{job}").json()["status"] == "CANCELLED"


def test_metrics_name_routes_and_nothing_of_anybody(guarded: Guarded) -> None:
    with guarded.client(guarded.alice) as alice, guarded.client(None) as stranger:
        job = alice.post("/runsync", json={"input": QUICK}).json()["id"]
        alice.get(f"/status/{job}")
        for number in range(3):
            stranger.get(f"/made-up-{number}")
        text = alice.get("/metrics").text
    assert 'endpoint="/status/{id}"' in text
    assert job not in text and "made-up" not in text
    assert "sdb_" not in text


def test_a_key_that_is_taken_away_stops_working_on_a_running_server(guarded: Guarded) -> None:
    file = guarded.server.log.parent / "keys.yaml"
    eve = entries.add(file, "eve")
    with guarded.client(eve) as http:
        until(lambda: http.get("/models").status_code == 200)
        entries.remove(file, "eve")
        until(lambda: http.get("/models").status_code == 401)
