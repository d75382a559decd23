"""Results of RunPod jobs: what fits, what goes to a bucket, what becomes JPEG, what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from io import BytesIO

import pytest
from PIL import Image

from sdbento.doors.runpod.delivery import Bucket, Delivery, Wish, posted_size
from sdbento.errors import SDBentoError, TooLarge
from sdbento.request.schema import GenerateResponse, Timings
from sdbento.settings import Settings, SettingsError
from tests.support.platform import Platform


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
        model="shapes",
        parameters={"prompt": "x"},
        timings=Timings(queued=0, denoising=0, decoding=0, total=0),
    )


def test_sizes_are_those_of_the_posted_body() -> None:
    response = response_of()
    size = posted_size(response.images)
    assert size == len(json.dumps({"output": response.images}))
    assert posted_size(["é"]) == len('{"output": [""]}') + 2


def test_what_fits_is_sent_as_it_is_and_one_byte_more_is_not() -> None:
    response = response_of()
    size = posted_size(response.images)
    exact = Delivery(Settings.load(runpod_max_run_bytes=size))
    assert exact.deliver("a", response, Wish()) == response.images
    short = Delivery(Settings.load(runpod_max_run_bytes=size - 1))
    with pytest.raises(TooLarge, match=f"{size} bytes; the limit is {size - 1}"):
        short.deliver("a", response, Wish())
    assert short.deliver("sync-a", response, Wish()) == response.images


def test_a_jpeg_that_is_too_large_as_well_is_an_error() -> None:
    delivery = Delivery(Settings.load(runpod_max_run_bytes=1024))
    with pytest.raises(TooLarge, match="the limit is 1024"):
        delivery.deliver("a", response_of(3), Wish(allow_jpeg=True))


@pytest.mark.parametrize("endpoint", ["s3.example.com", "foo:bar", "http://"])
def test_a_bucket_whose_address_is_no_url_stops_the_start(endpoint: str) -> None:
    with pytest.raises(SettingsError, match="must be a URL as https"):
        Bucket.configured(bucket_settings(endpoint))


def test_a_bucket_that_is_configured_by_half_stops_the_start() -> None:
    with pytest.raises(SettingsError, match="BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY"):
        Delivery(Settings.load(bucket_endpoint_url="https://s3.example", bucket_name="b"))
    assert Bucket.configured(Settings.load(bucket_name="")) is None  # RunPod's forms send ""


def bucket_settings(endpoint: str, key_id: str = "somebody") -> Settings:
    return Settings.load(
        bucket_endpoint_url=endpoint,
        bucket_access_key_id=key_id,
        bucket_secret_access_key="hush",
        bucket_name="bucket",
        runpod_max_run_bytes=1024,
    )


def test_an_upload_that_fails_fails_the_job(platform: Platform) -> None:
    delivery = Delivery(bucket_settings(platform.url, key_id="nobody"))
    with pytest.raises(SDBentoError, match=r"could not be uploaded to bucket bucket.*403"):
        delivery.deliver("a", response_of(), Wish())


@pytest.mark.parametrize(
    ("endpoint", "start"),
    [
        ("https://s3.us-west-2.amazonaws.com", "https://s3.us-west-2.amazonaws.com/bucket/a?"),
        ("https://bucket.s3.eu-west-1.amazonaws.com/", "https://s3.eu-west-1.amazonaws.com/bu"),
        ("https://fra1.digitaloceanspaces.com", "https://fra1.digitaloceanspaces.com/bucket/a?"),
        ("https://x.r2.cloudflarestorage.com", "https://x.r2.cloudflarestorage.com/bucket/a?"),
    ],
)
def test_endpoints_as_runpod_and_others_write_them(endpoint: str, start: str) -> None:
    bucket = Bucket.configured(bucket_settings(endpoint))
    assert bucket is not None
    place = {"Bucket": "bucket", "Key": "a"}
    url = bucket._client.generate_presigned_url("get_object", Params=place)
    assert url.startswith(start)
    region = {"us-west-2", "eu-west-1", "fra1"} & set(endpoint.replace("/", ".").split("."))
    assert f"%2F{next(iter(region), 'us-east-1')}%2Fs3" in url


def test_secrets_are_not_shown_but_reach_a_child() -> None:
    settings = bucket_settings("https://s3.example", key_id="somebody")
    shown = f"{settings!r} {settings.changed()}"
    assert "hush" not in shown and "somebody" not in shown
    assert settings.environment()["BUCKET_SECRET_ACCESS_KEY"] == "hush"
    with pytest.raises(SettingsError) as caught:
        Settings.load(bucket_secret_access_key=12345)
    assert "12345" not in str(caught.value)
