from __future__ import annotations

import asyncio
import gc
from base64 import b64decode

import pytest

from sdbento.environment import load_settings
from sdbento.errors import InvalidParameter, TooLarge
from sdbento.request.inputs import ImageReader, InputImages, make_control_images
from sdbento.request.schema import GenerateRequest
from sdbento.request.settle import settle
from sdbento.settings import Settings
from tests.request.test_settle import IMAGE, MASK, MAX_PIXELS, request, spec
from tests.support.hosts import hosting
from tests.support.images import gradient
from tests.support.job_server import until

SETTINGS = load_settings(allow_private_urls=True)


async def read_images(asked: GenerateRequest) -> InputImages:
    reader = ImageReader(SETTINGS)
    try:
        return await reader.read_all(asked)
    finally:
        reader.close()


async def test_images_are_read_from_every_accepted_form() -> None:
    images = await read_images(
        request(
            image=IMAGE,
            mask_image=MASK,
            controlnet=[{"type": "canny", "preprocess": True}, {"type": "x", "image": IMAGE}],
        )
    )
    assert images.image is not None and images.mask is not None
    assert all(image is not None for image in images.controls)


async def test_control_images_are_made_at_the_size_of_the_image() -> None:
    controls = [{"type": "canny", "preprocess": True}, {"type": "x"}]
    asked = request(image=IMAGE, controlnet=controls, width=128, height=72)
    images = await read_images(asked)
    settled, _ = settle(asked, spec(), images.size, MAX_PIXELS)
    edges, other = make_control_images(settled, images).controls
    assert edges is not None and other is not None
    assert edges.size == (128, 72)
    assert len(edges.getcolors() or ()) == 2  # black and white
    assert other.tobytes() == gradient().tobytes()


@pytest.mark.parametrize(
    ("controls", "param"),
    [
        ([{"type": "canny"}], "controlnet.0.image"),
        ([{"type": "inpaint"}], "controlnet.0.image"),
        ([{"type": "canny", "image": IMAGE}, {"type": "inpaint"}], "controlnet.1.image"),
    ],
    ids=str,
)
async def test_a_controlnet_without_any_image_is_refused(
    controls: list[dict[str, str]], param: str
) -> None:
    with pytest.raises(InvalidParameter, match="required") as caught:
        await read_images(request(controlnet=controls))
    assert caught.value.param == param


async def test_outpainting_enlarges_the_image_before_its_size_is_settled() -> None:
    asked = request(image=IMAGE, outpaint={"left": 32, "top": 16})
    images = await read_images(asked)
    assert images.image is not None and images.image.size == (96, 80)
    settled, _ = settle(asked, spec(), images.size, MAX_PIXELS)
    assert (settled.width, settled.height) == (96, 80)


def test_the_size_is_the_images_else_the_control_images() -> None:
    image, control = gradient(203, 101), gradient(77, 145)
    assert InputImages().size is None
    assert InputImages(image).size == (203, 101)
    assert InputImages(controls=(None, control)).size == (77, 145)
    assert InputImages(image, controls=(control,)).size == (203, 101)


async def test_images_at_urls_are_fetched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hosting(monkeypatch, body=b64decode(IMAGE.partition(",")[2])) as hosts:
        asked = request(
            image=f" {hosts.url('slow-0.example').upper()}\n",
            mask_image=hosts.url("slow-0.example"),
            controlnet=[{"type": "canny", "image": hosts.url("slow-1.example")}],
        )
        reading = asyncio.create_task(read_images(asked))
        await until(lambda: hosts.connected == {"slow-0.example": 2, "slow-1.example": 1})
        hosts.answer.set()
        images = await reading
        for image in (images.image, images.mask, *images.controls):
            assert image is not None and image.size == gradient().size


async def test_an_http_url_is_refused_where_private_ones_are() -> None:
    reader = ImageReader(Settings())
    with pytest.raises(InvalidParameter, match="use https") as caught:
        await reader.read("http://images.example/a.png", "mask_image")
    assert caught.value.param == "mask_image"
    reader.close()


async def test_the_field_whose_image_fails_is_named_and_the_others_are_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosting(monkeypatch, body=b"no picture") as hosts:
        asked = request(image=hosts.url("slow-0.example"), mask_image=hosts.url("quick-0.example"))
        with pytest.raises(InvalidParameter, match="cannot be decoded") as caught:
            await read_images(asked)
        assert caught.value.param == "mask_image"
        await until(lambda: hosts.connected.total() == 0)


async def test_nothing_stays_counted_of_a_request_that_fails() -> None:
    reader = ImageReader(SETTINGS)
    gc.disable()  # memory would be used up before it is run
    try:
        with pytest.raises(InvalidParameter, match="cannot be decoded"):
            await reader.read_all(request(image=IMAGE, mask_image="AAAA"))
        huge = request(
            image=IMAGE, outpaint=dict.fromkeys(("left", "right", "top", "bottom"), 4096)
        )
        with pytest.raises(TooLarge, match="outpaint"):
            await reader.read_all(huge)
        await until(lambda: reader.memory.num_bytes == 0)
    finally:
        gc.enable()
        reader.close()
