from __future__ import annotations

import json
from io import BytesIO

import pytest
from PIL import Image

from sdbento.images import EXIF_IFD, MEDIA_TYPES, USER_COMMENT, encode

PARAMETERS = {"prompt": "a café ☕", "seed": 2**63 - 1}
RED = Image.new("RGB", (16, 8), (255, 0, 0))


@pytest.mark.parametrize("output_format", MEDIA_TYPES)
def test_a_picture_survives_in_every_format(output_format: str) -> None:
    decoded = Image.open(BytesIO(encode(RED, output_format)))
    assert decoded.size == (16, 8)
    red, green, blue = decoded.convert("RGB").getpixel((4, 4))  # type: ignore[misc]
    assert red > 250 > 5 > max(green, blue)


def test_a_png_carries_its_parameters_as_text() -> None:
    decoded = Image.open(BytesIO(encode(RED, "png", PARAMETERS)))
    assert json.loads(decoded.info["parameters"]) == PARAMETERS


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_jpeg_and_webp_carry_them_as_the_exif_user_comment(output_format: str) -> None:
    exif = Image.open(BytesIO(encode(RED, output_format, PARAMETERS))).getexif()
    comment = exif.get_ifd(EXIF_IFD)[USER_COMMENT]
    assert comment.startswith(b"UNICODE\0")
    assert json.loads(comment[8:].decode("utf-16-be")) == PARAMETERS
