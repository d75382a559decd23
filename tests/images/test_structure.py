from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
from PIL import ExifTags, Image, ImageCms

from sdbento.errors import InvalidParameter
from sdbento.images.codec import decode
from sdbento.images.metadata import read_metadata
from sdbento.settings import Settings

RED = Image.new("RGB", (64, 64), (255, 0, 0))
ORIENTATION = (274, 3, 1, b"\6\0\0\0")


def file(image_format: str, image: Image.Image = RED, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(inserted: bytes, place: bytes = b"IDAT") -> bytes:
    data = file("PNG")
    at = data.index(place) - 4
    return data[:at] + inserted + data[at:]


def segment(marker: int, data: bytes = b"") -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", 2 + len(data)) + data


def jpeg(inserted: bytes) -> bytes:
    data = file("JPEG")
    return data[:2] + inserted + data[2:]


def gif(inserted: bytes) -> bytes:
    data = file("GIF")
    at = data.index(b",\0\0\0\0")
    return data[:at] + inserted + data[at:]


def tiff(*tags: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """A TIFF file of these tags (number, type, count, value or its place) and 3 MB of ones."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    entries = b"".join(struct.pack(order + "HHI4s", *tag) for tag in tags)
    return head + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4) + b"\1" * 3_000_000


def long(value: int) -> bytes:
    return struct.pack("<I", value)


EIGHT_BY_EIGHT = (
    (256, 4, 1, long(8)),
    (257, 4, 1, long(8)),
    (258, 3, 1, long(8)),
    (259, 3, 1, long(1)),
    (262, 3, 1, long(1)),
)


def in_one_tile(side: int, tile: int) -> bytes:
    """A TIFF file of a grey image, whose only tile is larger than the image."""
    pixels = zlib.compress(bytes(tile * tile))
    tags = [(322, 4, 1, long(tile)), (323, 4, 1, long(tile))]
    tags += [(324, 4, 1, long(8 + 2 + 12 * 9 + 4)), (325, 4, 1, long(len(pixels)))]
    deflate = [(256, 4, 1, long(side)), (257, 4, 1, long(side)), (258, 3, 1, long(8))]
    deflate += [(259, 3, 1, long(8)), (262, 3, 1, long(1))]
    return tiff(*deflate, *tags)[: 8 + 2 + 12 * 9 + 4] + pixels


MANY_VALUES = (65000, 5, 200_000, long(400))


def webp_with_exif(exif: bytes) -> bytes:
    return file("WEBP", exif=b"Exif\0\0" + exif)


def bmp_by_run_lengths() -> bytes:
    runs = b"\x08\x00" * 8 + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, len(runs), 0, 0, 256, 0)
    start = 14 + len(head) + 1024
    head = b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + head
    return head + bytes(range(256)) * 4 + runs


def progressive(num_more_scans: int) -> bytes:
    data = file("JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * num_more_scans + data[-2:]


def exif_behind_the_pixels() -> bytes:
    return png(chunk(b"eXIf", tiff(ORIENTATION, MANY_VALUES)), b"IEND")


def exif_as_text() -> bytes:
    exif = tiff(ORIENTATION, MANY_VALUES)
    text = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
    return png(chunk(b"tEXt", b"Raw profile type exif\0" + text))


SLOW: dict[str, tuple[str, Callable[[], bytes]]] = {
    "JPEG, empty segments": ("2000 segments", lambda: jpeg(segment(0xED) * 2001)),
    "JPEG, comments": ("2000 segments", lambda: jpeg(segment(0xFE, b"a") * 2001)),
    "JPEG, markers alone": ("2000 segments", lambda: jpeg(b"\xff\xd0" * 2001)),
    "JPEG, fill bytes": ("small parts", lambda: jpeg(b"\xff" * 60_000)),
    "JPEG, junk": ("small parts", lambda: jpeg(b"\xff\xd0" + b"\0" * 60_000)),
    "JPEG, EXIF": ("EXIF", lambda: jpeg(segment(0xE1, b"Exif\0\0" + b"x" * 65_000) * 17)),
    "JPEG, tables": ("tables", lambda: jpeg(segment(0xDB, (b"\0" + b"\1" * 64) * 300))),
    "JPEG, frames": ("tables", lambda: jpeg(segment(0xC0, b"\x08\0\1\0\1\3" + b"\1" * 20_000))),
    "JPEG, resources": (
        "resources",
        lambda: jpeg(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5000) * 3),
    ),
    "JPEG, scans": ("50 scans", lambda: progressive(50)),
    "PNG, empty chunks": ("small parts", lambda: png(chunk(b"abCd") * 30_000)),
    "PNG, texts": ("small parts", lambda: png(chunk(b"tEXt", b"k\0v") * 20_000)),
    "PNG, chunks behind the pixels": ("small parts", lambda: png(chunk(b"abCd") * 30_000, b"IEND")),
    "PNG, empty pixel chunks": ("small parts", lambda: png(chunk(b"IDAT") * 30_000)),
    "PNG, EXIF": ("values", lambda: png(chunk(b"eXIf", tiff(ORIENTATION, MANY_VALUES)))),
    "PNG, EXIF behind the pixels": ("values", exif_behind_the_pixels),
    "PNG, EXIF as text": ("values", exif_as_text),
    "WebP, EXIF": ("values", lambda: webp_with_exif(tiff(ORIENTATION, MANY_VALUES))),
    "GIF, one comment of many blocks": (
        "small parts",
        lambda: gif(b"!\xfe" + b"\1a" * 30_000 + b"\0"),
    ),
    "GIF, many comments": ("small parts", lambda: gif(b"!\xfe\1a\0" * 20_000)),
    "BMP, run lengths": ("RLE", bmp_by_run_lengths),
    "TIFF, strips": ("values", lambda: tiff(*EIGHT_BY_EIGHT, (273, 4, 150_000, long(400)))),
    "TIFF, tiles": ("values", lambda: tiff(*EIGHT_BY_EIGHT, (324, 4, 150_000, long(400)))),
    "TIFF, large tile": (
        "tiles have more than",
        lambda: in_one_tile(side=8, tile=4096),
    ),
    "TIFF, rationals": ("values", lambda: tiff(*EIGHT_BY_EIGHT, MANY_VALUES)),
    "TIFF, big endian": (
        "values",
        lambda: tiff((65000, 5, 200_000, struct.pack(">I", 400)), order=">"),
    ),
    "TIFF, directory in it": (
        "values",
        lambda: (
            tiff(*EIGHT_BY_EIGHT, (34665, 4, 1, long(94)))[:94]
            + struct.pack("<H", 1)
            + struct.pack("<HHI4s", *MANY_VALUES)
            + b"\1" * 3_000_000
        ),
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_file_of_too_many_parts_is_refused(name: str) -> None:
    reason, make = SLOW[name]
    with pytest.raises(InvalidParameter, match="too long to decode; save it anew") as caught:
        decode(make(), Settings(), param="mask_image")
    assert reason in caught.value.message
    assert caught.value.message.startswith("mask_image ")
    assert caught.value.param == "mask_image"


@pytest.mark.parametrize("name", ["JPEG, comments", "PNG, empty chunks", "WebP, EXIF"])
def test_nor_is_it_read_for_its_metadata(name: str) -> None:
    with pytest.raises(InvalidParameter, match="too long to decode"):
        read_metadata(SLOW[name][1]())


def phone() -> bytes:
    """EXIF with a maker note, an ICC profile of many segments, extended XMP."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = b"m" * 50_000
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (1.0, 2.0, 3.5)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = file("JPEG", exif=exif, icc_profile=profile + b"\0" * 3_000_000, progressive=True)
    xmp = segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + b"x" * 60_000)
    return data[:2] + xmp * 100 + data[2:]


def photoshop() -> bytes:
    resources = b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 100
    return jpeg(segment(0xED, resources) * 50 + segment(0xED, b"Adobe_CM\0") * 500)


def many_pixel_chunks() -> bytes:
    """Like those of programs that begin a chunk every few hundred bytes."""
    data = file("PNG")
    at = data.index(b"IDAT")
    (size,) = struct.unpack(">I", data[at - 4 : at])
    pixels = data[at + 4 : at + 4 + size]
    chunks = [chunk(b"IDAT", pixels[i : i + 1]) for i in range(size)]
    return data[: at - 4] + (chunk(b"IDAT") * 100).join(chunks) + data[at + 8 + size :]


def scan() -> bytes:
    """100 MPixel are about 10,000 rows; here a strip is one row too."""
    return file("TIFF", Image.new("L", (8, 10_000), 255), strip_size=8)


def animation(image_format: str) -> bytes:
    frames = [Image.new("RGB", (64, 64), (0, i, 255)) for i in range(200)]
    return file(image_format, save_all=True, append_images=frames)


def gif_with_xmp() -> bytes:
    return gif(b"!\xff\x0bXMP DataXMP" + (b"\xff" + b"x" * 255) * 5000 + b"\0")


@pytest.mark.parametrize(
    "make",
    [
        phone,
        photoshop,
        many_pixel_chunks,
        scan,
        gif_with_xmp,
        *(lambda name=name: animation(name) for name in ("GIF", "WEBP", "PNG", "TIFF")),
    ],
)
def test_files_as_cameras_and_editors_write_them_are_decoded(make: Callable[[], bytes]) -> None:
    image = decode(make(), Settings(max_pixels=4096 * 4096), param="image")
    pixel = image.getpixel((4, 4))
    assert isinstance(pixel, tuple)
    assert pixel[0] > 250
