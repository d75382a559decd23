"""Results of RunPod jobs: sent as they are, uploaded to a bucket, turned into JPEG, or refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from io import BytesIO

import pytest
from PIL import Image

from sdbento.doors.runpod.delivery import Delivery, posted_size
from sdbento.environment import load_settings
from sdbento.errors import SDBentoError, TooLarge
from sdbento.jobs.formats.native import Flags, JobInput
from sdbento.request.schema import GenerateRequest, GenerateResponse, Timings
from tests.doors.runpod.test_bucket import bucket_settings
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
        infotexts=["x"] * num_images,
        model="shapes",
        parameters={"prompt": "x"},
        timings=Timings(queued=0, denoising=0, decoding=0, total=0),
    )


def asking(allow_jpeg: bool = False) -> JobInput:
    return JobInput(Flags(allow_jpeg=allow_jpeg), GenerateRequest(prompt="x"))


def test_sizes_are_measured_on_the_posted_body() -> None:
    response = response_of()
    size = posted_size(response.images)
    assert size == len(json.dumps({"output": response.images}))
    assert posted_size(["é"]) == len('{"output": [""]}') + 2


def test_a_result_within_the_limit_is_sent_unchanged_and_one_byte_more_is_not() -> None:
    response = response_of()
    size = posted_size(response.images)
    exact = Delivery(load_settings(runpod_max_run_bytes=size))
    assert exact.deliver("a", response, asking()) == response.images
    short = Delivery(load_settings(runpod_max_run_bytes=size - 1))
    with pytest.raises(TooLarge, match=f"{size} bytes; the limit is {size - 1}"):
        short.deliver("a", response, asking())
    assert short.deliver("sync-a", response, asking()) == response.images


def test_a_jpeg_that_is_too_large_as_well_is_an_error() -> None:
    delivery = Delivery(load_settings(runpod_max_run_bytes=1024))
    with pytest.raises(TooLarge, match="the limit is 1024"):
        delivery.deliver("a", response_of(3), asking(allow_jpeg=True))


def test_an_upload_that_fails_fails_the_job(platform: Platform) -> None:
    delivery = Delivery(bucket_settings(platform.url, key_id="nobody"))
    with pytest.raises(SDBentoError, match=r"could not be uploaded to bucket bucket.*403"):
        delivery.deliver("a", response_of(), asking())
