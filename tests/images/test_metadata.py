"""What files say of their images, in every format, and what is read of other programs' files."""

from __future__ import annotations

import json
import warnings
import zlib
from io import BytesIO
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from sdbento.errors import InvalidParameter
from sdbento.images.codec import MEDIA_TYPES, encode
from sdbento.images.metadata import Metadata, read_metadata
from tests.support.damage import damaged

RED = Image.new("RGB", (16, 8), "red")
PARAMETERS = {"prompt": "a café ☕", "seed": 2**63 - 1}
METADATA = Metadata("a café ☕ 猫\nSteps: 20, Seed: 4, Size: 16x8", PARAMETERS)


@pytest.mark.parametrize("output_format", MEDIA_TYPES)
def test_what_is_embedded_is_read(output_format: str) -> None:
    assert read_metadata(encode(RED, output_format, METADATA)) == METADATA
    assert read_metadata(encode(RED, output_format)) == Metadata()


def test_a_png_has_the_infotext_where_the_web_ui_looks() -> None:
    texts = Image.open(BytesIO(encode(RED, "png", METADATA))).info
    assert texts["parameters"] == METADATA.infotext
    assert json.loads(texts["sdbento"]) == PARAMETERS


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats_have_it_as_the_exif_user_comment(output_format: str) -> None:
    exif = Image.open(BytesIO(encode(RED, output_format, METADATA))).getexif()
    comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment.startswith(b"UNICODE\0")
    assert comment[8:].decode("utf-16-be") == METADATA.infotext


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
@pytest.mark.parametrize(("length", "left"), [(25_000, "infotext"), (40_000, "nothing")])
def test_of_texts_too_long_for_exif_what_fits_is_kept(
    output_format: str, length: int, left: str
) -> None:
    """A JPEG that would exceed it cannot be written: "EXIF data is too long"."""
    long = Metadata("☕" * length, {"prompt": "☕" * length})
    read = read_metadata(encode(RED, output_format, long))
    assert read == (Metadata(long.infotext) if left == "infotext" else Metadata())


def test_files_of_our_first_versions_are_read() -> None:
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(PARAMETERS))
    buffer = BytesIO()
    RED.save(buffer, "PNG", pnginfo=info)
    assert read_metadata(buffer.getvalue()) == Metadata(None, PARAMETERS)


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "a cat".encode("utf-16-le"),
        b"UNICODE\0" + "a cat".encode("utf-16-be"),
        b"ASCII\0\0\0a cat",
    ],
)
def test_every_encoding_of_a_user_comment_is_read(comment: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    buffer = BytesIO()
    RED.save(buffer, "JPEG", exif=exif)
    assert read_metadata(buffer.getvalue()) == Metadata("a cat")


def test_the_chunks_may_follow_the_pixels() -> None:
    data = encode(RED, "png")
    chunk = encode(RED, "png", Metadata("a cat"))
    start = chunk.index(b"iTXt") - 4
    text = chunk[start : start + 12 + int.from_bytes(chunk[start : start + 4], "big")]
    assert read_metadata(data[:-12] + text + data[-12:]) == Metadata("a cat")


def test_a_picture_too_large_for_memory_is_not_decoded() -> None:
    header = bytearray(encode(RED, "png", Metadata("a cat")))
    header[16:24] = (2**31 - 1).to_bytes(4, "big") * 2  # width and height
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    assert read_metadata(bytes(header)) == Metadata("a cat")
    nothing = bytes(header[:33]) + encode(RED, "png")[33:]
    assert read_metadata(nothing) == Metadata()


@pytest.mark.parametrize("data", [b"", b"no image", encode(RED, "png")[:20]])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidParameter, match="no PNG, JPEG or WebP file"):
        read_metadata(data)


@example(
    "一", {"prompt": "一"}, "jpeg"
)  # its last byte is 0, as that of "N" in the other byte order
@given(
    st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.booleans()), min_size=1),
    st.sampled_from([*MEDIA_TYPES]),
)
def test_all_that_is_embedded_is_read(
    text: str, parameters: dict[str, Any], output_format: str
) -> None:
    metadata = Metadata(text, parameters)
    assert read_metadata(encode(RED, output_format, metadata)) == metadata


@given(damaged(st.sampled_from([encode(RED, name, METADATA) for name in MEDIA_TYPES])))
def test_a_damaged_file_is_read_or_refused(data: bytes) -> None:
    with warnings.catch_warnings(action="ignore"):  # PIL's, which a server has in its log
        try:
            found = read_metadata(data)
        except InvalidParameter:
            return
    assert isinstance(found, Metadata)
