"""Image files opened with bounds on their structure: how many parts PIL has to read in Python.

A file of a few megabytes may consist of millions of segments, chunks, blocks or strips. PIL goes
through them one by one, for minutes, in a thread that nobody can stop. The bounds lie far above
what cameras, scanners and editors write. Decodes no pixels.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection
from io import BytesIO
from itertools import islice

from PIL import Image
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from sdbento.errors import InvalidParameter

MAX_READS = 50_000  # by PIL: about three a PNG chunk, two a GIF block, one a byte between segments
MAX_SEGMENTS = 2_000  # of a JPEG file before its pixels
MAX_SCANS = 50  # of a JPEG file; each goes through all pixels. Usual are 1 or about 10
MAX_JPEG_TABLES = 16 * 1024  # bytes of quantization tables and frame headers; usual are 300
MAX_EXIF_BYTES = 1024 * 1024  # of a JPEG file; one segment has at most 64 KiB
MAX_RESOURCES = 10_000  # of Photoshop, in a JPEG file
MAX_VALUES = 100_000  # in the tags of a TIFF file or EXIF data: strips and tiles have two each
MAX_DIRECTORIES = 8  # of these values
MAX_TILE = 2048 * 2048  # pixels; PIL makes room for a whole tile, however small the image is

_MARKER = re.compile(rb"\xff([^\x00\xff])")  # after fill bytes and junk
_SCAN = re.compile(rb"\xff\xda\x00[\x06\x08\x0a\x0c][\x01-\x04]")
_SOS, _APP1, _APP13 = 0xDA, 0xE1, 0xED
_TABLES = {0xDB, 0xDE, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # without those PIL skips
_WITHOUT_LENGTH = {0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)}

# Bytes of a value by its TIFF type. PIL makes an object of each, except of bytes and characters.
_UNITS = {3: 2, 4: 4, 5: 8, 6: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_DIRECTORY_TAGS = {34665, 34853, 40965}  # EXIF, GPS, interoperability

_RLE = (1, 2)  # compressions of BMP that PIL decodes in Python, pixel by pixel


class _Reader(BytesIO):
    """A file that can be read so many times."""

    def __init__(self, data: bytes, param: str) -> None:
        super().__init__(data)
        self._param = param
        self._left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise _refused(self._param, "consists of too many small parts")
        return super().read(size)


def open_image(data: bytes, formats: Collection[str], *, param: str) -> Image.Image:
    """`PIL.Image.open`, for files that others made.

    Raises InvalidParameter for a file of too many parts, and whatever PIL raises. What comes after
    the headers is bounded too: then loading the image raises InvalidParameter.
    """
    if data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data, param)
    elif data.startswith((b"II", b"MM")):
        _check_directories(data, param)
    image = Image.open(_Reader(data, param), formats=list(formats))
    if image.format == "BMP" and image.info.get("compression") in _RLE:
        raise _refused(param, "is a BMP file compressed by run lengths (RLE)")
    if isinstance(image, TiffImageFile) and _tile_pixels(image) > MAX_TILE:
        raise _refused(param, f"is a TIFF file whose tiles have more than {MAX_TILE} pixels")
    return image


def _tile_pixels(image: TiffImageFile) -> int:
    sides = (image.tag_v2.get(tag, 0) for tag in (TILEWIDTH, TILELENGTH))
    width, length = (side if isinstance(side, int) else max(side, default=0) for side in sides)
    return int(width * length)


def check_exif(image: Image.Image, *, param: str) -> None:
    """Raises InvalidParameter if reading the image's EXIF data would take too long.

    To be called before `getexif`, and once a PNG is loaded: it may have them behind its pixels.
    """
    exif = image.info.get("exif") or b""
    if not exif and "Raw profile type exif" in image.info:  # ImageMagick's, in hexadecimal
        raw = str(image.info["Raw profile type exif"])
        try:
            exif = bytes.fromhex("".join(raw.split("\n")[3:]))
        except ValueError:
            return  # PIL cannot read it either
    if isinstance(exif, bytes):
        _check_directories(re.sub(rb"^(Exif\x00\x00){1,2}", b"", exif), param)


def _check_jpeg(data: bytes, param: str) -> None:
    """Goes from marker to marker just as PIL does, up to the pixels."""
    tables = exif = resources = 0
    position = 2
    for _ in range(MAX_SEGMENTS):
        match = _MARKER.search(data, position, position + MAX_READS)
        if match is None or (marker := match[1][0]) == _SOS:
            break
        position = match.end()
        if marker in _WITHOUT_LENGTH:
            continue
        start = position + 2
        position = max(start, position + int.from_bytes(data[position:start], "big"))
        if marker in _TABLES:
            tables += position - start
        elif marker == _APP1 and data.startswith(b"Exif\0\0", start):
            exif += position - start
        elif marker == _APP13:
            resources += data.count(b"8BIM", start, position)
    else:
        raise _refused(param, f"is a JPEG file of more than {MAX_SEGMENTS} segments")
    if tables > MAX_JPEG_TABLES or exif > MAX_EXIF_BYTES or resources > MAX_RESOURCES:
        raise _refused(param, "is a JPEG file with too many tables, EXIF data or resources")
    if any(True for _ in islice(_SCAN.finditer(data), MAX_SCANS, None)):
        raise _refused(param, f"is a JPEG file of more than {MAX_SCANS} scans")


def _check_directories(data: bytes, param: str) -> None:
    """Counts the values of a TIFF file, which EXIF data are too, in all directories PIL reads."""
    order, sign = ("little", "<") if data.startswith(b"II") else ("big", ">")
    big = data[2:3] == b"\x2b"
    entry = struct.Struct(sign + ("HHQ8s" if big else "HHL4s"))

    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start : start + size], order)  # type: ignore[arg-type]

    pending, seen, num_values = [number(8, 8) if big else number(4, 4)], set(), 0
    while pending:
        start = pending.pop()
        if start in seen:
            continue
        seen.add(start)
        size = 8 if big else 2  # of the number of entries
        num_entries = min(number(start, size), MAX_READS)  # more cannot be read
        end = min(start + size + num_entries * entry.size, len(data))
        for place in range(start + size, end - entry.size + 1, entry.size):
            tag, kind, count, value = entry.unpack_from(data, place)
            unit = _UNITS.get(kind)
            if unit is None or count * unit > len(data):  # PIL skips those too
                continue
            num_values += count
            if tag in _DIRECTORY_TAGS:
                inline = count * unit <= len(value)
                at = place + entry.size - len(value)
                pending.append(number(at if inline else number(at, len(value)), unit))
        if num_values > MAX_VALUES or len(seen) + len(pending) > MAX_DIRECTORIES:
            raise _refused(param, f"has TIFF or EXIF tags of more than {MAX_VALUES} values")


def _refused(param: str, reason: str) -> InvalidParameter:
    return InvalidParameter(
        f"{param} {reason}, which would take too long to decode; save it anew, as PNG or JPEG",
        param=param,
    )
