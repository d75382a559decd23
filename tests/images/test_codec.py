from __future__ import annotations

import base64
import struct
import tracemalloc
import warnings
import zlib
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from sdbento.errors import InvalidParameter, SDBentoError, TooLarge
from sdbento.images import codec
from sdbento.images.codec import MEDIA_TYPES, decode, encode, flatten, read
from sdbento.settings import Settings
from tests.support.damage import damaged

RED = Image.new("RGB", (16, 8), (255, 0, 0))
SETTINGS = Settings()


def file(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def pixel(image: Image.Image, place: tuple[int, int] = (4, 4)) -> tuple[int, ...]:
    value = image.getpixel(place)
    assert isinstance(value, tuple)
    return value


def refusal(source: str, settings: Settings = SETTINGS) -> str:
    with pytest.raises(InvalidParameter) as caught:
        read(source, settings, param="mask_image")
    assert caught.value.param == "mask_image"
    assert len(caught.value.message) < 250
    return caught.value.message


def png_claiming(width: int, height: int) -> bytes:
    """A PNG file of a few bytes whose header promises `width` × `height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("output_format", MEDIA_TYPES)
def test_an_image_survives_in_every_format(output_format: str) -> None:
    decoded = Image.open(BytesIO(encode(RED, output_format)))
    assert decoded.size == (16, 8)
    red, green, blue = decoded.convert("RGB").getpixel((4, 4))  # type: ignore[misc]
    assert red > 250 > 5 > max(green, blue)


# Where an image may come from


def test_an_image_as_base64_is_a_png_file() -> None:
    image = Image.new("RGB", (3, 2), "red")
    data = base64.b64decode(codec.as_base64(image), validate=True)
    assert (data[1:4], decode(data, Settings(), param="image")) == (b"PNG", image)


def test_base64_and_data_uris_are_read() -> None:
    data = text(file(RED))
    for source in (
        data,
        f"data:image/png;base64,{data}",
        f"DATA:image/png;charset=utf-8;BASE64,{data}",
        f"data:;base64,{data}",
        f"  data:image/png;base64,{data}\n",
        "data:image/png;base64," + data.replace("+", "%2B").replace("=", "%3D"),
        data.rstrip("="),
        data.replace("+", "-").replace("/", "_"),
        "\r\n ".join(data[i : i + 20] for i in range(0, len(data), 20)),
    ):
        assert read(source, SETTINGS, param="image").tobytes() == RED.tobytes()


def test_escapes_of_letters_are_no_base64_and_cost_no_memory() -> None:
    source = "%41" * 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(InvalidParameter, match="must be an https URL, a data URI or base64"):
            read(source, SETTINGS, param="image")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 10 * len(source)  # 200 bytes an escape when they were all unquoted


@pytest.mark.parametrize("size", [(codec.MAX_SIDE + 1, 1), (1, codec.MAX_SIDE + 1)])
def test_an_image_with_a_side_that_is_too_long_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(TooLarge, match="no side may have more than 32768"):
        decode(file(Image.new("L", size)), SETTINGS, param="image")
    assert decode(file(Image.new("L", (codec.MAX_SIDE, 1))), SETTINGS, param="image").height == 1


@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_missing_base64_padding_is_accepted(num_bytes: int) -> None:
    data = text(file(RED) + b"x" * num_bytes)
    assert read(data.rstrip("="), SETTINGS, param="image").size == RED.size


@pytest.mark.parametrize(
    "source",
    [
        "",
        " ",
        "=",
        "hello",
        "hell",
        "/etc/passwd",
        "file:///etc/passwd",
        "a cat!",
        "é",
        "%",
        "data:",
    ],
)
def test_data_that_is_no_image_is_refused_with_the_accepted_forms(source: str) -> None:
    message = refusal(source)
    assert message.startswith("mask_image")
    assert "https URL" in message and "base64" in message and "PNG" in message


@pytest.mark.parametrize("uri", ["data:image/png,rawbytes", "data:image/svg+xml;utf8,<svg/>"])
def test_other_data_uris_are_refused_with_an_example(uri: str) -> None:
    assert "data:image/png;base64," in refusal(uri)


@pytest.mark.parametrize("junk", ["A" * 100_000, "!" * 100_000, "data:" + "x" * 100_000])
def test_messages_do_not_echo_what_was_sent(junk: str) -> None:
    assert junk[-50:] not in refusal(junk)


# What is decoded


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_these_formats_are_decoded(image_format: str) -> None:
    image = decode(file(RED, image_format), SETTINGS, param="image")
    assert (image.mode, image.size) == ("RGB", (16, 8))
    red, green, blue = pixel(image)
    assert red > 250 > 5 > max(green, blue)


@pytest.mark.parametrize("image_format", ["PPM", "ICO", "TGA", "PDF", "EPS"])
def test_other_formats_are_not(image_format: str) -> None:
    assert "accepted is" in refusal(text(file(RED, image_format)))


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_used(image_format: str) -> None:
    blue = Image.new("RGB", RED.size, (0, 0, 255))
    data = file(RED, image_format, save_all=True, append_images=[blue])
    assert pixel(decode(data, SETTINGS, param="image"))[0] > 250


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 128, (128, 128, 128)),
        ("LA", (128, 7), (128, 128, 128, 7)),
        ("P", 0, (0, 0, 0)),
        ("RGBA", (1, 2, 3, 4), (1, 2, 3, 4)),
        ("I;16", 0x8080, (128, 128, 128)),
        ("I;16", 0xFFFF, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb_or_rgba(mode: str, colour: Any, expected: tuple[int, ...]) -> None:
    image = decode(file(Image.new(mode, (8, 8), colour)), SETTINGS, param="image")
    assert image.mode == ("RGB" if len(expected) == 3 else "RGBA")
    assert pixel(image) == expected


def test_a_transparent_palette_becomes_rgba() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    image = decode(file(palette, transparency=1), SETTINGS, param="image")
    assert (image.mode, pixel(image)) == ("RGBA", (0, 255, 0, 0))


def test_cmyk_becomes_rgb() -> None:
    data = file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    image = decode(data, SETTINGS, param="image")
    assert image.mode == "RGB"
    assert pixel(image)[0] > 240 > 20 > pixel(image)[1]


def test_floats_of_unknown_range_are_refused() -> None:
    assert "32 bits" in refusal(text(file(Image.new("F", (8, 8), 0.5), "TIFF")))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright(orientation: int, image_format: str) -> None:
    upright = Image.new("L", (24, 16))
    upright.paste(255, (0, 0, 8, 8))  # a white corner at the upper left
    turned = upright.transpose(INVERSE[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = file(turned.convert("RGB"), image_format, exif=exif)
    image = decode(data, SETTINGS, param="image")
    assert image.size == upright.size
    assert np.abs(np.asarray(image.convert("L"), float) - np.asarray(upright)).mean() < 3


INVERSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def test_an_image_is_turned_upright_though_its_exif_cannot_be_written_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = file(Image.new("RGB", (24, 16)), "JPEG", exif=exif)

    def fail(*_: object) -> bytes:
        raise ValueError

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    assert decode(data, SETTINGS, param="image").size == (16, 24)


def test_broken_exif_is_ignored() -> None:
    data = file(RED, "JPEG", exif=b"Exif\0\0nonsense")
    assert decode(data, SETTINGS, param="image").size == RED.size


# Limits and damage


def test_a_file_of_too_many_bytes_is_refused() -> None:
    settings = Settings(max_image_bytes=1024)
    with pytest.raises(TooLarge, match=r"limit is 1024 \(SDBENTO_MAX_IMAGE_BYTES\)") as caught:
        decode(b"x" * 1025, settings, param="image")
    assert caught.value.param == "image"
    with pytest.raises(TooLarge, match="1024"):
        read("A" * 2000, settings, param="image")


@pytest.mark.parametrize("size", [(4097, 4096), (60_000, 60_000), (2**31 - 1, 1)])
def test_pixels_are_counted_before_they_are_decoded(size: tuple[int, int]) -> None:
    settings = Settings(max_pixels=1024 * 1024)
    with pytest.raises(TooLarge, match=f"{size[0]} × {size[1]}.*16777216.*SDBENTO_MAX_PIXELS"):
        decode(png_claiming(*size), settings, param="image")


def test_a_permitted_image_is_not_taken_for_a_decompression_bomb() -> None:
    image = decode(file(Image.new("L", (256, 256))), Settings(max_pixels=4096), param="image")
    assert image.size == (256, 256)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_half_a_file_is_refused(image_format: str) -> None:
    data = file(NOISE, image_format)
    assert "cannot be decoded as an image" in refusal(text(data[: len(data) // 2]))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_half_a_file_is_called_truncated(image_format: str) -> None:
    data = file(NOISE, image_format)
    assert refusal(text(data[: len(data) // 2])).endswith("as an image: truncated")


def test_a_damaged_file_is_called_damaged() -> None:
    data = bytearray(file(NOISE))
    data[60:90] = bytes(30)
    assert refusal(text(bytes(data))).endswith("as an image: damaged")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_no_damage_raises_anything_else(image_format: str) -> None:
    original = file(NOISE, image_format)
    random = np.random.default_rng(0)
    for _ in range(100):
        data = bytearray(original)
        for place in random.integers(0, min(len(data), 400), 4):
            data[place] = random.integers(256)
        with suppress(InvalidParameter, TooLarge):
            assert decode(bytes(data), SETTINGS, param="image").mode in ("RGB", "RGBA")


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    flat = flatten(image)
    assert flat.mode == "RGB"
    assert (flat.getpixel((0, 0)), flat.getpixel((4, 4))) == ((255, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_lies_on_white_in_every_mode(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
    assert flatten(image).tobytes() == Image.new("RGB", (8, 8), "white").tobytes()


@given(
    st.binary(min_size=1, max_size=200),
    st.sampled_from(["", "data:image/png;base64,", "DATA:;base64,"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", "\n", " ", "%0A"]),
)
def test_base64_is_read_however_it_is_written(
    data: bytes, prefix: str, urlsafe: bool, padded: bool, separator: str
) -> None:
    encoded = (base64.urlsafe_b64encode if urlsafe else base64.b64encode)(data).decode()
    lines = [encoded[i : i + 76] for i in range(0, len(encoded), 76)]
    source = separator.join(lines) if padded else separator.join(lines).rstrip("=")
    assert codec.read_encoded(prefix + source, SETTINGS, param="image") == data


@given(
    st.text()
    | st.from_regex(r"data:[a-z/;=]{0,20}(;base64)?,[A-Za-z0-9+/=%_-]{0,40}", fullmatch=True)
)
def test_every_text_is_bytes_or_an_error_that_names_its_field(source: str) -> None:
    try:
        assert codec.read_encoded(source, SETTINGS, param="image")
    except SDBentoError as error:
        assert (error.param, "image" in error.message) == ("image", True)  # noqa: PT017


FILES = [file(RED, image_format) for image_format in codec.FORMATS]


@given(damaged(st.sampled_from(FILES)))
def test_a_damaged_image_is_decoded_or_refused(data: bytes) -> None:
    small = Settings(max_pixels=64 * 64)
    with warnings.catch_warnings(action="ignore"):  # PIL's, which a server has in its log
        try:
            image = decode(data, small, param="image")
        except SDBentoError as error:
            assert error.param == "image"  # noqa: PT017
            return
    assert image.mode in ("RGB", "RGBA")
    assert image.width * image.height <= codec.PIXELS_FACTOR * small.max_pixels
