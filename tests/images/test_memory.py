"""Decoded images are counted before they are decoded, and until they end."""

from __future__ import annotations

from base64 import b64decode

import pytest
from PIL import Image

from sdbento.access.caller import Caller, acting_for
from sdbento.environment import load_settings
from sdbento.errors import InvalidParameter, LimitReached, Overloaded
from sdbento.images import memory
from sdbento.images.memory import PIXEL_BYTES, ImageMemory
from tests.support.images import base64, gradient

FILE = b64decode(base64(gradient(64, 64)))
EACH = PIXEL_BYTES * 64 * 64
SETTINGS = load_settings(max_pixels=64 * 64)


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> ImageMemory:
    """Room for 32 images."""
    monkeypatch.setattr(memory, "MAX_BYTES", 0)
    return ImageMemory(SETTINGS)


def decoded(images: ImageMemory, num_images: int) -> list[Image.Image]:
    return [images.decode(FILE, "image") for _ in range(num_images)]


def test_no_pixel_is_decoded_where_there_is_no_room_and_an_image_that_ends_makes_some(
    images: ImageMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = decoded(images, 32)
    assert images.num_bytes == 32 * EACH
    with monkeypatch.context() as patch:
        patch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
        with pytest.raises(Overloaded, match="used up") as caught:
            images.decode(FILE, "image")
    assert caught.value.retry_after
    del held[0], caught
    assert images.num_bytes == 31 * EACH
    decoded(images, 1)


def test_a_key_leaves_room_for_others(images: ImageMemory) -> None:
    with acting_for(Caller("alice", shares=True)):
        held = decoded(images, 16)
        with pytest.raises(LimitReached, match="your share of the memory for images"):
            decoded(images, 1)
    with acting_for(Caller("bob", shares=True)):
        held += decoded(images, 8)
    assert images.num_bytes == len(held) * EACH


def test_damaged_files_take_no_room(images: ImageMemory) -> None:
    with pytest.raises(InvalidParameter, match="truncated"):
        images.decode(FILE[: len(FILE) // 2], "image")
    assert images.num_bytes == 0


def test_what_is_made_of_images_is_counted_as_long_as_its_holder_lives(
    images: ImageMemory,
) -> None:
    holder = Image.new("L", (8, 8))
    images.count(holder, 10 * EACH)
    assert images.num_bytes == 10 * EACH
    del holder
    assert images.num_bytes == 0
