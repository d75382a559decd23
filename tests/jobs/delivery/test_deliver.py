"""Results of RunPod jobs: sent as they are, uploaded to a bucket, turned into JPEG, or refused."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import pytest
from PIL import Image

from sdbento.environment import load_settings
from sdbento.errors import InvalidParameter, TooLarge, Unavailable
from sdbento.jobs.delivery import bucket
from sdbento.jobs.delivery.bucket import Bucket
from sdbento.jobs.delivery.deliver import Delivery, Result, posted_size
from sdbento.jobs.delivery.s3_config import S3Config, s3_config_of
from sdbento.jobs.formats.a1111 import Call
from sdbento.jobs.formats.native import Flags, JobInput
from sdbento.outbound import names
from sdbento.request.schema import GenerateRequest, GenerateResponse, Timings
from tests.jobs.delivery.test_bucket import bucket_settings
from tests.support.job_server import until
from tests.support.metrics import counted
from tests.support.platform import Platform
from tests.support.s3 import SECRET, Store, storing


@pytest.fixture
def platform() -> Iterator[Platform]:
    platform = Platform()
    platform.start()
    yield platform
    platform.stop()


def response_of(num_images: int = 1, side: int = 64) -> GenerateResponse:
    buffer = BytesIO()
    Image.effect_noise((side, side), 50).convert("RGB").save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    return GenerateResponse(
        images=[image] * num_images,
        seeds=list(range(num_images)),
        infotexts=["x"] * num_images,
        model="shapes",
        parameters={"prompt": "x"},
        timings=Timings(queued=0, denoising=0, decoding=0, total=0),
    )


def result_of(
    response: GenerateResponse, allow_jpeg: bool = False, s3_config: S3Config | None = None
) -> Result:
    flags, request = Flags(allow_jpeg=allow_jpeg), GenerateRequest(prompt="x")
    return JobInput(flags, request, s3_config=s3_config).result(response)


def test_sizes_are_measured_on_the_posted_body() -> None:
    response = response_of()
    size = posted_size(response.images)
    assert size == len(json.dumps({"output": response.images}))
    assert posted_size(["é"]) == len('{"output": [""]}') + 2


async def test_a_result_within_the_limit_is_sent_unchanged_and_one_byte_more_is_not() -> None:
    response = response_of()
    size = posted_size(response.images)
    exact = Delivery(load_settings(runpod_max_run_bytes=size), limited=True)
    assert await exact.deliver("a", result_of(response)) == response.images
    short = Delivery(load_settings(runpod_max_run_bytes=size - 1), limited=True)
    with pytest.raises(TooLarge, match=f"{size} bytes; the limit is {size - 1}"):
        await short.deliver("a", result_of(response))
    assert await short.deliver("sync-a", result_of(response)) == response.images


async def test_only_choices_that_a_format_has_are_advised() -> None:
    delivery = Delivery(load_settings(runpod_max_run_bytes=1024), limited=True)
    with pytest.raises(TooLarge, match="allow_jpeg"):
        await delivery.deliver("a", result_of(response_of()))
    answer = {"images": response_of().images, "info": "{}"}
    with pytest.raises(TooLarge) as caught:
        await delivery.deliver("a", Call("POST", "/sdapi/v1/txt2img", {}).result(answer))
    assert "jpeg" not in caught.value.message


async def test_a_jpeg_that_is_too_large_as_well_is_an_error() -> None:
    delivery = Delivery(load_settings(runpod_max_run_bytes=1024), limited=True)
    with pytest.raises(TooLarge, match="the limit is 1024"):
        await delivery.deliver("a", result_of(response_of(3), allow_jpeg=True))


async def test_an_upload_that_fails_fails_the_job(platform: Platform) -> None:
    delivery = Delivery(bucket_settings(platform.url, key_id="nobody"), limited=True)
    before = counted()
    with pytest.raises(Unavailable, match=r"could not be uploaded to bucket bucket: 403"):
        await delivery.deliver("a", result_of(response_of()))
    assert counted().since(before) == {"sdbento_uploads_total{outcome=failed}": 1}


async def test_a_bucket_that_cannot_be_reached_is_not_named_to_clients(
    caplog: pytest.LogCaptureFixture,
) -> None:
    delivery = Delivery(bucket_settings("http://127.0.0.1:1"), limited=False)
    with pytest.raises(Unavailable) as caught:
        await delivery.deliver("a", result_of(response_of()))
    assert "127.0.0.1" not in caught.value.message
    assert "127.0.0.1" in caplog.text and "hush" not in caplog.text


def read_from(urls: Any, start: str) -> list[bytes]:
    """What is behind URLs, which all must begin with `start`."""
    assert all(url.startswith(start) for url in urls)
    return [httpx.get(url, trust_env=False).content for url in urls]


async def test_a_server_without_a_bucket_has_no_limit() -> None:
    delivery = Delivery(load_settings(runpod_max_run_bytes=1024), limited=False)
    response = response_of(3)
    assert await delivery.deliver("a", result_of(response)) == response.images


@pytest.mark.parametrize("limited", [True, False])
async def test_results_above_the_limit_or_all_are_uploaded(
    platform: Platform, limited: bool
) -> None:
    response, place = response_of(2), f"{platform.url}/bucket/"
    images = [base64.b64decode(image) for image in response.images]
    settings = bucket_settings(platform.url)
    before = counted()
    large = await Delivery(settings, limited=limited).deliver("a", result_of(response))
    assert read_from(large, place) == images
    assert counted().since(before) == {"sdbento_uploads_total{outcome=ok}": 2}
    roomy = settings.model_copy(update={"runpod_max_run_bytes": 10**7})
    small = await Delivery(roomy, limited=limited).deliver("a", result_of(response))
    assert small == response.images
    always = roomy.model_copy(update={"upload": "always"})
    again = await Delivery(always, limited=limited).deliver("a", result_of(response))
    assert read_from(again, place) == images
    assert not set(platform.bucket) & {"a/0.png", "a/1.png"}  # nobody can guess their names


async def test_an_output_that_is_too_large_without_its_images_is_an_error(
    platform: Platform,
) -> None:
    settings = bucket_settings(platform.url).model_copy(update={"runpod_max_run_bytes": 1000})
    [image] = response_of().images
    result = Call("POST", "/sdapi/v1/img2img", {}).result(
        {"images": [image], "parameters": {"init_images": [image]}}
    )
    for upload in ("oversize", "always"):
        delivery = Delivery(settings.model_copy(update={"upload": upload}), limited=True)
        with pytest.raises(TooLarge, match=r"without its images .* the limit is 1000"):
            await delivery.deliver("a", result)
    server = Delivery(settings, limited=False)
    output = await server.deliver("a", result)
    assert output["parameters"] == {"init_images": [image]}


# A bucket that the job brings along


@pytest.fixture
def store() -> Iterator[Store]:
    with storing() as store:
        yield store


async def delivered(
    store: Store,
    num_images: int = 1,
    job_id: str = "a",
    secret: str = SECRET,
    **settings: Any,
) -> Any:
    given = {"accessId": "AKIA/x+y", "accessSecret": secret, "bucketName": "pictures"}
    s3_config = s3_config_of({**given, "endpointUrl": f"{store.url}/ignored"})
    delivery = Delivery(load_settings(**{"allow_private_urls": True} | settings), limited=False)
    result = result_of(response_of(num_images), s3_config=s3_config)
    return await delivery.deliver(job_id, result)


async def test_every_result_goes_to_the_bucket_of_the_job(store: Store) -> None:
    urls = await delivered(store, num_images=2, job_id="../é a")
    read = read_from(urls, f"{store.url}/pictures/.._")
    assert [data[:4] for data in read] == [b"\x89PNG"] * 2
    assert list(store.objects.values()) == [("image/png", data) for data in read]
    assert SECRET not in str(urls)


async def test_credentials_that_the_bucket_refuses_are_the_fault_of_the_job(store: Store) -> None:
    with pytest.raises(InvalidParameter, match="its host answered 403") as caught:
        await delivered(store, secret="guess")
    assert caught.value.param == "s3Config"
    assert store.num_puts == 1


async def test_the_bucket_of_a_job_is_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "PAUSES", (0.0, 0.0, 0.0))
    store.statuses = [503, 500]
    assert await delivered(store)
    assert store.num_puts == 3
    store.statuses = [500] * 9
    with pytest.raises(InvalidParameter, match="answered 500"):
        await delivered(store)
    assert store.num_puts == 6


async def test_nothing_more_is_uploaded_once_a_job_is_cancelled(store: Store) -> None:
    store.statuses = [200] + [500] * 9
    uploading = asyncio.create_task(delivered(store, num_images=3))
    await until(lambda: store.num_puts == 2)
    uploading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await uploading
    assert store.num_puts == 2


async def test_a_bucket_of_the_operator_that_hangs_does_not_keep_all_threads_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release = threading.Event()
    monkeypatch.setattr(Bucket, "_put", lambda *_: release.wait(20))
    settings = bucket_settings("https://s3.example").model_copy(update={"upload": "always"})
    delivery = Delivery(settings, limited=True)
    uploads = [
        asyncio.create_task(delivery.deliver("a", result_of(response_of()))) for _ in "x" * 64
    ]
    try:
        await asyncio.sleep(0.2)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 10) == "free"
    finally:
        release.set()
    assert len(await asyncio.gather(*uploads)) == 64
    delivery.close()


async def test_a_redirect_of_the_bucket_is_not_followed(store: Store) -> None:
    store.statuses = [307]
    with pytest.raises(InvalidParameter, match="answered 307"):
        await delivered(store)


async def test_a_name_that_leads_inside_is_not_connected_to(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "look_up", lambda host, port: ["127.0.0.1"])
    store.url = f"https://s3.rebound.example:{store.server_port}"
    with pytest.raises(InvalidParameter, match="private or reserved"):
        await delivered(store, allow_private_urls=False)
    assert store.num_puts == 0
