"""What the App allows to whom: models, images at once, and a share of the queue."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdbento.access.caller import Allowance, Caller, acting_for
from sdbento.app import App
from sdbento.catalog.lookup import Catalog
from sdbento.catalog.specs import ModelSpec
from sdbento.errors import Forbidden, LimitReached, Overloaded, UnknownModel
from sdbento.request.schema import GenerateRequest
from sdbento.settings import Settings
from tests.doors.runpod.test_api import QuickRunner
from tests.support.fakes import FakeRunner
from tests.support.hosts import hosting
from tests.support.job_server import until
from tests.support.tiny import save_tiny

XL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture
async def app() -> AsyncIterator[App]:
    settings = Settings(sd_model="shapes", max_queue_size=6, max_batch_size=4, offline=True)
    app = App(settings, QuickRunner(seconds=0.02))
    app.start()
    yield app
    await asyncio.to_thread(app.close)


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt="a red circle", num_inference_steps=4, **fields)


def only(*models: str) -> Caller:
    return Caller("a", Allowance(models=frozenset(models)))


@pytest.mark.parametrize("name", ["shapes", "SHAPES", None])
async def test_a_model_that_the_key_allows_is_used_by_any_of_its_names(
    app: App, name: str | None
) -> None:
    with acting_for(only("shapes")):
        await app.generate(request(model=name))


@pytest.mark.parametrize(
    "name", [XL, "sdxl", "./shapes", "shapes/", " shapes", "org/unheard-of", "/etc/passwd", "*"]
)
async def test_all_others_are_forbidden_whether_they_exist_or_not(app: App, name: str) -> None:
    with acting_for(only("shapes")):
        with pytest.raises(Forbidden) as refused:
            await app.generate(request(model=name))
        assert refused.value.param == "model"
        with pytest.raises(Forbidden):
            await app.find_model(name)


async def test_the_default_model_is_no_exception(app: App) -> None:
    with acting_for(only(XL)), pytest.raises(Forbidden):
        await app.generate(request())
    with acting_for(only()), pytest.raises(Forbidden):
        await app.generate(request())


async def test_the_folder_of_a_default_model_that_a_key_may_not_use_is_not_told(
    tmp_path: Path,
) -> None:
    app = App(Settings(sd_model=str(tmp_path / "secret"), offline=True), FakeRunner())
    with acting_for(only("shapes")), pytest.raises(Forbidden) as refused:
        await app.generate(request())
    assert refused.value.message == "this key does not allow this server's default model"
    app.close(0)


async def test_a_refiner_is_a_model_as_well(app: App) -> None:
    with acting_for(only(XL)), pytest.raises(Forbidden) as refused:
        await app.generate(request(model=XL, refiner={"model": "stabilityai/sdxl-turbo"}))
    assert refused.value.param == "refiner.model"


async def test_only_models_that_the_key_allows_are_listed(app: App) -> None:
    everything = [model.spec.name for model in app.list_models()]
    assert {"shapes", XL} <= set(everything)
    with acting_for(only("shapes")):
        assert [model.spec.name for model in app.list_models()] == ["shapes"]


async def test_images_at_once_are_counted_over_all_requests_of_a_key(app: App) -> None:
    alice = Caller("alice", Allowance(images_at_once=4))
    with acting_for(alice):
        first = asyncio.create_task(app.generate(request(num_images=3)))
        stream = app.stream(request())
        await anext(stream)
        await asyncio.sleep(0)
        with pytest.raises(LimitReached) as refused:
            await app.generate(request())
        assert refused.value.retry_after is not None
        with pytest.raises(Forbidden):
            await app.generate(request(num_images=5))
        with acting_for(Caller("bob", Allowance(images_at_once=4))):
            await app.generate(request())
        await stream.aclose()
        await first
        await app.generate(request(num_images=4))


async def test_a_request_that_is_refused_or_cancelled_gives_its_images_back(app: App) -> None:
    alice = Caller("alice", Allowance(images_at_once=2, models=frozenset(["shapes"])))
    with acting_for(alice):
        for _ in range(3):
            with pytest.raises(Forbidden):
                await app.generate(request(num_images=2, model=XL))
            task = asyncio.create_task(app.generate(request(num_images=2)))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await app.generate(request(num_images=2))


async def test_no_key_fills_the_queue_where_others_have_one(app: App) -> None:
    alice, bob = Caller("alice", shares=True), Caller("bob", shares=True)
    with acting_for(alice):
        flood = await asyncio.gather(
            *(app.generate(request()) for _ in range(20)), return_exceptions=True
        )
        refused = [error for error in flood if isinstance(error, LimitReached)]
        assert len(refused) == 15  # of ten places, five are left to others
        assert all(error.retry_after for error in refused)
        tasks = [asyncio.create_task(app.generate(request())) for _ in range(5)]
        await asyncio.sleep(0)
        with acting_for(bob):
            await app.generate(request())
        await asyncio.gather(*tasks)


async def test_the_only_key_may_have_the_whole_queue(app: App) -> None:
    with acting_for(Caller("default")):
        flood = await asyncio.gather(
            *(app.generate(request()) for _ in range(20)), return_exceptions=True
        )
    assert sum(isinstance(error, Overloaded) for error in flood) == 10


class SlowHub:
    """Knows no model, and says so only once it is `open`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        describe = Catalog._describe

        def answer(catalog: Catalog, name: str, source: str, offline: bool) -> ModelSpec:
            if not Path(source).is_absolute():
                self.open.wait(20)
                raise UnknownModel(f"there is no {name}")
            return describe(catalog, name, source, offline)

        monkeypatch.setattr(Catalog, "_describe", answer)


async def test_what_one_key_asks_the_hub_counts_as_its_requests_and_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub, mine = SlowHub(monkeypatch), str(save_tiny("sd15", tmp_path / "mine"))
    settings = Settings(sd_model=mine, max_queue_size=16, max_batch_size=4, allow_any_model=True)
    app = App(settings, FakeRunner())
    with acting_for(Caller("alice", shares=True)):
        asked = [asyncio.create_task(app.find_model(f"hub/m{i}")) for i in range(30)]
    await asyncio.sleep(0)
    with acting_for(Caller("bob", shares=True)):
        for name in (None, mine, "shapes"):
            assert await asyncio.wait_for(app.find_model(name), 10)
        bobs = asyncio.create_task(app.find_model("hub/of-bob"))
    hub.open.set()
    with pytest.raises(UnknownModel):
        await bobs
    errors = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(error, LimitReached) for error in errors) == 20  # of 20 places, 10
    assert sum(isinstance(error, UnknownModel) for error in errors) == 10
    app.close(0)


async def test_slow_hosts_of_one_key_do_not_hold_up_the_images_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    settings = Settings(sd_model="shapes", allow_private_urls=True)
    app = App(settings, FakeRunner())
    async with hosting(monkeypatch, body=picture.getvalue(), num_addresses=30) as hosts:
        with acting_for(Caller("alice", shares=True)):
            slow = [
                asyncio.create_task(app.read_image(hosts.url(f"slow-{i}.example"), param="image"))
                for i in range(50)
            ]
        await until(lambda: hosts.connected.total() == 50)
        with acting_for(Caller("bob", shares=True)):
            url = hosts.url("quick-1.example")
            assert await asyncio.wait_for(app.read_image(url, param="image"), 10)
        hosts.answer.set()
        await asyncio.gather(*slow)
    app.close(0)
