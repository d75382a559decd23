"""The App with several models in a folder: everything from a request to its images."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from sdbento.access.caller import Caller, acting_for
from sdbento.app import App
from sdbento.backend.local import LORA_THREADS
from sdbento.environment import load_settings
from sdbento.errors import (
    DeadlineExceeded,
    InvalidParameter,
    Overloaded,
    SDBentoError,
    Unavailable,
    UnsupportedModel,
)
from sdbento.images import codec
from sdbento.request.schema import GenerateRequest
from sdbento.settings import Settings
from tests.support.device_errors import AcceleratorError
from tests.support.fakes import FakeRunner
from tests.support.hosts import hosting
from tests.support.images import data_uri, gradient, half_mask
from tests.support.local import local
from tests.support.oracle import engine_pixels, tiny_control, tiny_model
from tests.support.tiny import save_tiny, save_tiny_controlnet

BASE: dict[str, Any] = {
    "prompt": "a cat",
    "num_inference_steps": 5,
    "seed": 4,
    "width": 64,
    "height": 64,
    "guidance_scale": 5.0,
}
EDGES = data_uri(gradient(seed=5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("sd15", "sd15-inpaint", "sdxl", "sdxl-refiner"):
        save_tiny(kind, folder / f"tiny-{kind}")
    for family in ("sd15", "sdxl"):
        save_tiny_controlnet(family, folder / f"control-{family}")
    return folder


@pytest_asyncio.fixture(loop_scope="function")
async def app(folder: Path) -> AsyncIterator[App]:
    app = App(load_settings(sd_model="tiny-sdxl", models_dir=folder, allow_any_model=True))
    app.start()
    yield app
    await asyncio.to_thread(app.close)


async def made(app: App, **fields: Any) -> NDArray[np.int16]:
    result = await app.run(GenerateRequest(**{**BASE, **fields}))
    return np.asarray(result.images[0], np.int16)


def expected(kind: str, **options: Any) -> NDArray[np.int16]:
    pixels = engine_pixels(tiny_model(kind), **{**BASE, **options})
    return (pixels * 255).round().astype(np.int16)


def assert_same(one: NDArray[np.int16], other: NDArray[np.int16]) -> None:
    assert np.abs(one - other).max() <= 1


async def test_a_misspelt_setting_is_reported_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SDBENTO_MAX_PIXLES", "65536")
    app = App(load_settings(sd_model="shapes"))
    app.start()
    await asyncio.to_thread(app.close)
    assert "SDBENTO_MAX_PIXLES is set, but no setting has that name" in caplog.text


# At 64 x 64 two UNet calls and two decodes; at 128 x 128 four calls of each power of two, four
# decodes, and one call of each row count, for which steps are captured where they can be.
MEASUREMENTS = 4 + 4 * 4 + 4 + 8


class Measuring(FakeRunner):
    """Notes whether the app was ready at each measurement, which waits for `go_on`."""

    def __init__(self) -> None:
        super().__init__()
        self.app: App | None = None
        self.ready_at: list[bool] = []
        self.go_on = threading.Event()

    def measure(self, *_: object, capture: bool = False) -> float:
        assert self.app is not None
        self.ready_at.append(self.app.ready)
        assert self.go_on.wait(20)
        return 0.001

    measure_decode = measure


@asynccontextmanager
async def measuring(**options: Any) -> AsyncIterator[tuple[App, Measuring]]:
    runner: Any = Measuring()
    app = runner.app = App(load_settings(sd_model="shapes", **options), runner)
    app.start()
    try:
        yield app, runner
    finally:
        runner.go_on.set()
        await asyncio.to_thread(app.close)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lora": {"model_id": "misspelt"}}, "lora"),
        ({"prompt": "a cat <lora:misspelt:1>"}, "prompt"),
        ({"prompt_2": "a dog"}, "prompt_2"),
        ({"negative_prompt_2": "a dog"}, "negative_prompt_2"),
        ({"prompt": "a cat in ink"}, "prompt"),
        ({"negative_prompt": "broken"}, "prompt"),
    ],
    ids=str,
)
async def test_bad_requests_are_refused_before_a_model_is_loaded_where_possible(
    folder: Path, tmp_path: Path, fields: dict[str, Any], param: str
) -> None:
    for_sdxl = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}
    save_file(for_sdxl, tmp_path / "ink.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    settings = load_settings(sd_model="shapes", models_dir=folder, embeddings_dir=tmp_path)
    app = App(settings)  # not started: it has not even loaded the default model
    with pytest.raises(InvalidParameter) as caught:
        await made(app, model="tiny-sd15", **fields)
    assert caught.value.param == param
    assert local(app).pipelines.loaded() == []
    await asyncio.to_thread(app.close)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_the_server_is_ready_when_its_model_is_loaded_and_measures_it_when_idle() -> None:
    async with measuring() as (app, runner):
        await until(lambda: app.ready and runner.ready_at)
        request = asyncio.create_task(app.run(GenerateRequest(prompt="x", timeout=20)))
        await until(lambda: app.num_requests == 1)
        runner.go_on.set()
        assert len((await request).images) == 1
        await until(lambda: len(runner.ready_at) == MEASUREMENTS)
        assert all(runner.ready_at)


class AtOnce:
    """A UNet that is compiled without a compiler."""

    def __init__(self, *_: object) -> None:
        pass

    def compile(self, call: Callable[[int], object], max_rows: int) -> None:
        for rows in (1, max_rows):
            call(rows)


async def test_the_server_is_not_ready_before_its_model_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdbento.models.weights.CompiledUnet", AtOnce)
    async with measuring(compile=True) as (app, runner):
        await until(lambda: runner.ready_at)
        assert not app.ready
        runner.go_on.set()
        await until(lambda: len(runner.ready_at) == 2 + MEASUREMENTS)
        assert runner.ready_at == [False] * 2 + [True] * MEASUREMENTS


async def test_freed_memory_is_given_back_beside_requests_and_after_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released_beside: list[int] = []  # so many requests
    monkeypatch.setattr("sdbento.process.malloc.RELEASE_EVERY", 0.001)
    app = App(load_settings(sd_model="shapes"), FakeRunner())
    monkeypatch.setattr(
        "sdbento.process.malloc.release_freed_memory",
        lambda: released_beside.append(app.num_requests),
    )
    app.start()
    async with app.counted():
        await until(lambda: 1 in released_beside)
    released_beside.clear()
    await until(lambda: 0 in released_beside)
    await asyncio.to_thread(app.close)


async def test_a_late_request_without_images_is_not_blamed_on_their_fetch(app: App) -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        await made(app, timeout=1e-6)
    assert "image" not in caught.value.message


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({}, 600),
        ({"max_timeout": 60}, 60),
        ({"request_timeout": 60}, 60),
        ({"request_timeout": 60, "max_timeout": 900}, 900),
    ],
)
async def test_no_request_has_more_time_than_the_server_allows_unless_it_is_a_job(
    settings: dict[str, float], longest: int
) -> None:
    app = App(Settings(sd_model="shapes", **settings), FakeRunner())
    resolve = app._resolver.resolve
    longer, longest_one = (GenerateRequest(prompt="x", timeout=longest + i) for i in (1, 0))
    with pytest.raises(InvalidParameter, match=f"{longest} seconds.*SDBENTO_MAX_TIMEOUT") as caught:
        await app.generate(longer)
    assert caught.value.param == "timeout"
    assert (await resolve(longest_one, 0.0)).deadline == longest
    assert (await resolve(GenerateRequest(prompt="x"), 0.0)).deadline <= longest
    assert (await resolve(longer, 0.0, seconds=5000.0)).deadline == 5000.0
    await asyncio.to_thread(app.close)


async def test_the_refiner_is_leased_beside_its_base(app: App) -> None:
    refiner = {"model": "tiny-sdxl-refiner", "switch_at": 0.6}
    image = await made(app, refiner=refiner)
    refined_by = tiny_model("sdxl-refiner")
    assert_same(image, expected("sdxl", refined_by=refined_by, refiner=refiner))


async def test_a_controlnet_is_named_by_its_folder(app: App, folder: Path) -> None:
    control = {"type": str(folder / "control-sd15"), "image": EDGES}
    image = await made(app, model="tiny-sd15", controlnet=control)
    networks = [tiny_control("sd15")]
    assert_same(image, expected("sd15", controlnets=networks, controlnet=control))


async def test_an_inpainting_model_repaints_and_draws(app: App) -> None:
    images = {"image": data_uri(gradient()), "mask_image": data_uri(half_mask())}
    repainted = await made(app, model="tiny-sd15-inpaint", **images)
    assert_same(repainted, expected("sd15-inpaint", **images))
    drawn = await made(app, model="tiny-sd15-inpaint")
    assert drawn.std() > 3


async def test_concurrent_requests_for_different_models_get_their_own_images(
    app: App, folder: Path
) -> None:
    requests: list[dict[str, Any]] = [
        {"model": "tiny-sd15"},
        {"model": "tiny-sdxl"},
        {"model": "tiny-sdxl", "refiner": {"model": "tiny-sdxl-refiner"}},
        {
            "model": "tiny-sd15",
            "controlnet": {"type": str(folder / "control-sd15"), "image": EDGES},
        },
        {
            "model": "tiny-sdxl",
            "controlnet": {"type": str(folder / "control-sdxl"), "image": EDGES},
        },
        {"model": "tiny-sd15-inpaint", "image": EDGES, "mask_image": data_uri(half_mask())},
    ]
    alone = [await made(app, **fields) for fields in requests]
    together = await asyncio.gather(*(made(app, **fields) for fields in requests * 3))
    for i, image in enumerate(together):
        assert_same(image, alone[i % len(requests)])


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"refiner": {"model": "tiny-sd15"}}, "refiner.model", "SDXL"),
        (
            {"model": "tiny-sd15", "controlnet": {"type": "CONTROL", "image": EDGES}},
            "controlnet",
            "sdxl",
        ),
        ({"controlnet": {"type": "canny", "image": EDGES}}, "controlnet", "canny"),
        ({"model": "tiny-sd15", "prompt_2": "a dog"}, "prompt_2", "SDXL"),
        ({"model": "nobody"}, "model", "nearest"),
    ],
)
async def test_combinations_that_do_not_fit_are_refused_by_name(
    app: App, folder: Path, fields: dict[str, Any], param: str, words: str
) -> None:
    if "controlnet" in fields and fields["controlnet"]["type"] == "CONTROL":
        fields = {
            **fields,
            "controlnet": {**fields["controlnet"], "type": str(folder / "control-sdxl")},
        }
    with pytest.raises(SDBentoError, match=words) as caught:
        await made(app, **fields)
    assert caught.value.status in (404, 422)
    assert (caught.value.param or "").startswith(param)


async def test_a_request_that_is_refused_frees_its_place(app: App) -> None:
    for _ in range(app.settings.max_queue_size + 10):
        with pytest.raises(InvalidParameter):
            await made(app, strength=0.5)
    assert (await made(app)).shape == (64, 64, 3)


async def test_an_image_that_is_read_takes_a_place_of_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = App(load_settings(sd_model="shapes", max_queue_size=1, max_batch_size=1), FakeRunner())
    goes_on = asyncio.Event()

    async def wait(*_: object) -> None:
        await goes_on.wait()

    monkeypatch.setattr(app._resolver, "read_image", wait)
    reading = [asyncio.create_task(app.read_image(EDGES, param="image")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await app.read_image(EDGES, param="image")
    goes_on.set()
    await asyncio.gather(*reading, app.read_image(EDGES, param="image"))


async def test_whoever_finds_the_queue_full_while_a_model_loads_is_told_at_once() -> None:
    app = App(load_settings(sd_model="shapes", max_queue_size=1, max_batch_size=1), FakeRunner())
    local(app).engine.start()
    loading = Future[Any]()
    local(app).pipelines._load = lambda _: loading.result(60)
    waiting = [asyncio.create_task(app.run(GenerateRequest(prompt="x"))) for _ in range(2)]
    try:
        await until(lambda: local(app).pipelines._pending)
        refused = app.run(GenerateRequest(prompt="x"))
        with pytest.raises(Overloaded) as caught:
            refused.send(None)  # up to where it would wait for something
        assert caught.value.retry_after
    finally:
        loading.set_exception(OSError())
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.to_thread(app.close)


async def test_a_gpu_that_failed_for_good_is_remembered_and_a_request_that_failed_is_not() -> None:
    errors = {1: ValueError("a bug"), 2: AcceleratorError("CUDA error: unspecified launch failure")}
    runner: Any = FakeRunner(lambda trajectory: errors.get(trajectory.seed))
    app = App(load_settings(sd_model="shapes"), runner)
    app.start()
    try:
        for seed, alive in ((1, True), (2, False), (3, False)):
            with suppress(SDBentoError):
                await app.run(GenerateRequest(prompt="x", seed=seed))
            assert app.alive is alive
        assert not app.ready
    finally:
        await asyncio.to_thread(app.close)


async def test_whoever_can_replace_the_process_is_told_once_when_a_step_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdbento.engine.watchdog.TICK", 0.01)
    monkeypatch.setattr("sdbento.engine.loop.UNTIMED", 0.1)
    goes_on, told = threading.Event(), list[bool]()

    def hang(_: object) -> None:
        goes_on.wait(60)

    runner: Any = FakeRunner(hang)
    settings = load_settings(sd_model="shapes", stall_seconds=1.0)
    app = App(settings, runner, on_broken=told.append)
    app.start()
    try:
        hung = [app.run(GenerateRequest(prompt="x", seed=seed)) for seed in range(2)]
        for error in await asyncio.gather(*hung, return_exceptions=True):
            assert isinstance(error, Unavailable) and error.retry_after
        with pytest.raises(Unavailable, match="is being restarted"):
            await app.run(GenerateRequest(prompt="x"))
        assert not app.alive
        app.report_broken("something else")
        assert told == [False]
    finally:
        goes_on.set()
        await asyncio.to_thread(app.close)


async def test_whoever_waits_for_requests_is_told_when_a_device_that_hangs_keeps_them() -> None:
    told = list[bool]()
    app = App(load_settings(sd_model="shapes"), FakeRunner(), on_broken=told.append)
    local(app).engine.start()
    app.report_broken("the jobs have died")
    app.report_broken("the jobs have died again")
    assert told == [True]
    for _ in range(2):
        local(app).lose("a step hangs")
    assert told == [True, False]
    await asyncio.to_thread(app.close)


async def test_whoever_waits_for_a_model_when_the_device_fails_may_send_the_request_again() -> None:
    app = App(load_settings(sd_model="shapes"), FakeRunner())
    local(app).engine.start()
    loading = Future[Any]()
    local(app).pipelines._load = lambda _: loading.result(60)
    waiting = asyncio.create_task(app.run(GenerateRequest(prompt="x")))
    try:
        await until(lambda: local(app).pipelines._pending)
        local(app).lose("a step hangs")
        with pytest.raises(Unavailable, match="is being restarted") as caught:
            await waiting
        assert caught.value.retry_after
        later = local(app).pipelines.acquire(app.catalog.resolve("shapes")).exception()
        assert isinstance(later, Unavailable) and later.retry_after
    finally:
        loading.set_exception(OSError())
        await asyncio.to_thread(app.close)


async def test_a_file_that_cannot_be_made_fails_its_own_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode, calls = codec.encode, list[object]()

    def sometimes(*args: Any, **options: Any) -> bytes:
        calls.append(args)
        if len(calls) == 1:
            raise ValueError("a bug")
        return encode(*args, **options)

    monkeypatch.setattr(codec, "encode", sometimes)
    runner: Any = FakeRunner()
    app = App(load_settings(sd_model="shapes"), runner)
    app.start()
    try:
        asked = [app.generate(GenerateRequest(prompt="x", seed=seed)) for seed in range(3)]
        made = await asyncio.gather(*asked, return_exceptions=True)
        assert sorted(type(one).__name__ for one in made) == [
            "GenerateResponse",
            "GenerateResponse",
            "ValueError",
        ]
    finally:
        await asyncio.to_thread(app.close)


def lose_the_gpu(*_: object, **__: object) -> Any:
    raise AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("where", "compile"),
    [
        ("sdbento.models.weights._load_model", False),
        ("tests.support.fakes.FakeRunner.measure", True),  # while it is compiled
        ("tests.support.fakes.FakeRunner.measure", False),  # while the server is idle
        ("tests.support.fakes.FakeRunner.measure_decode", False),
    ],
)
async def test_a_gpu_that_fails_while_nobody_waits_for_it_is_remembered(
    where: str, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdbento.models.weights.CompiledUnet", AtOnce)
    monkeypatch.setattr(where, lose_the_gpu)
    app = App(load_settings(sd_model="shapes", compile=compile), FakeRunner())
    app.start()
    try:
        await until(lambda: app._broken)
        assert not app.alive
    finally:
        await asyncio.to_thread(app.close)


@pytest.mark.parametrize(
    "where", ["sdbento.models.weights._load_model", "sdbento.lora.layers.copied"]
)
async def test_a_gpu_that_fails_during_a_request_is_remembered(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App(load_settings(sd_model="shapes"), FakeRunner())  # not started: loads for the request
    local(app).engine.start()
    monkeypatch.setattr(where, lose_the_gpu)
    try:
        with pytest.raises((SDBentoError, AcceleratorError)):
            await made(app, lora={"model_id": "outline"})
        assert not app.alive
    finally:
        await asyncio.to_thread(app.close)


@pytest.mark.parametrize("owner", ["a", "b"])
async def test_one_image_goes_before_most_of_another_owners_many(owner: str) -> None:
    """With the same owner it waits for its turn."""
    app = App(load_settings(sd_model="shapes", max_batch_size=4))
    app.start()
    done: list[str] = []

    async def make(name: str, owner: str, num_images: int, num_steps: int) -> None:
        with acting_for(Caller(owner)):
            await app.run(
                GenerateRequest(
                    prompt="a red circle", num_images=num_images, num_inference_steps=num_steps
                )
            )
        done.append(name)

    many = [asyncio.create_task(make("many", "a", 2, 20)) for _ in range(6)]
    await until(lambda: len(done) > 0)
    await asyncio.gather(make("one", owner, 1, 4), *many)
    await asyncio.to_thread(app.close)
    assert done.index("one") <= 3 if owner == "b" else done.index("one") > 3


async def test_loras_from_slow_hosts_hold_up_nobody_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"allow_lora_urls": True, "allow_private_urls": True, "fetch_timeout": 60}
    app = App(load_settings(sd_model="tiny-sd15", models_dir=folder, **limits))
    app.start()
    async with hosting(monkeypatch, body=b"no LoRA", num_addresses=40) as hosts:
        slow = []
        for i in range(40):
            url = hosts.url(f"slow-{i}.example").replace("image.png", "a.safetensors")
            lora = {"model_id": url, "weight": 1.0}
            with acting_for(Caller(address="192.0.2.1")):
                slow.append(asyncio.create_task(made(app, lora=lora)))
        await until(lambda: hosts.connected.total() == LORA_THREADS)
        with acting_for(Caller(address="192.0.2.2")):
            assert (await asyncio.wait_for(made(app), 60)).shape == (64, 64, 3)
        hosts.answer.set()
        errors = await asyncio.gather(*slow, return_exceptions=True)
        assert all(isinstance(error, UnsupportedModel) for error in errors)
    await asyncio.to_thread(app.close)


async def test_whoever_still_waits_for_a_slow_host_is_told_when_the_server_stops(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"allow_private_urls": True, "fetch_timeout": 60}
    app = App(load_settings(sd_model="tiny-sd15", models_dir=folder, **limits))
    app.start()
    async with hosting(monkeypatch) as hosts:
        waiting = asyncio.create_task(made(app, image=hosts.url("slow-1.example")))
        await until(lambda: hosts.connected.total() == 1)
        app.give_up()
        with pytest.raises(Unavailable, match="the server is stopping"):
            await asyncio.wait_for(waiting, 10)
        with pytest.raises(Unavailable, match="the server is stopping"):
            await made(app)
        hosts.answer.set()
    await asyncio.to_thread(app.close)
