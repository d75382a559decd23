"""Images to files, and back from what clients send.

What clients send is not trusted: bytes and pixels are counted before anything is decoded. Uses no
torch, and opens no sockets: see `outbound`.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sdbento.errors import InvalidParameter, SDBentoError, TooLarge
from sdbento.images import structure
from sdbento.images.metadata import Metadata
from sdbento.settings import Settings

QUALITY = 95  # of JPEG and WebP, where a request does not say
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # that are decoded
ACCEPTED = "an https URL, a data URI or base64 of a PNG, JPEG, WebP, GIF, BMP or TIFF file"
PIXELS_FACTOR = 16  # how much larger than the largest generated image a sent one may be
# To resize a row of millions of pixels, PIL computes for seconds, in which no other thread of this
# process runs; cameras' panoramas and what JPEG can hold (65,535) are shorter or seldom longer.
MAX_SIDE = 32_768
Image.MAX_IMAGE_PIXELS = None  # PIL's limit for the whole process; ours depends on the settings

_DATA_URI = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
_URLSAFE = bytes.maketrans(b"-_", b"+/")
# What of base64 is escaped in a URL. `unquote` would take 200 bytes of memory for each escape.
_ESCAPES = {"%2B": "+", "%2F": "/", "%3D": "=", "%0A": "", "%0D": "", "%20": ""}


def encode(
    image: Image.Image,
    output_format: str,
    metadata: Metadata | None = None,
    *,
    quality: int | None = None,
) -> bytes:
    """`image` as a file in `output_format` (a key of MEDIA_TYPES), with its `metadata` embedded.

    `quality`: of JPEG and WebP, 0 to 100; None: QUALITY.
    """
    buffer = BytesIO()
    metadata = metadata or Metadata()
    if output_format == "png":
        image.save(buffer, "PNG", pnginfo=metadata.as_png_info(), compress_level=1)
    else:
        exif = metadata.as_exif()
        quality = QUALITY if quality is None else quality
        image.save(buffer, output_format.upper(), quality=quality, exif=exif)
    return buffer.getvalue()


def as_base64(image: Image.Image, metadata: Metadata | None = None) -> str:
    """A PNG file, as base64 without a prefix."""
    return b64encode(encode(image, "png", metadata)).decode("ascii")


def read(source: str, settings: Settings, *, param: str) -> Image.Image:
    """The image in a data URI or base64, decoded as by `decode`."""
    return decode(read_encoded(source.strip(), settings, param=param), settings, param=param)


def read_encoded(source: str, settings: Settings, *, param: str) -> bytes:
    """The file in a data URI or base64, whatever it is. Raises TooLarge and InvalidParameter."""
    if match := _DATA_URI.match(source):
        if not match.group().lower().endswith(";base64,"):
            raise InvalidParameter(
                f"{param} is a data URI that is not base64; send data:image/png;base64,...",
                param=param,
            )
        source = source[match.end() :]
    return _from_base64(source, settings, param)


def decode(
    data: bytes,
    settings: Settings,
    *,
    param: str,
    make_room: Callable[[int], None] = lambda _: None,
) -> Image.Image:
    """The first frame of an image file, upright, "RGB" or, where it has transparency, "RGBA".

    Raises TooLarge above `settings.max_image_bytes` or 16 × `settings.max_pixels`, the latter
    before a pixel is decoded, and InvalidParameter if `data` is no image.
    `make_room` is given the number of pixels before they are decoded, and may raise.
    """
    _check_bytes(len(data), settings, param)
    try:
        with structure.open_image(data, FORMATS, param=param) as image:
            _check_pixels(image.size, settings, param)
            make_room(image.width * image.height)
            image.load()
            structure.check_exif(image, param=param)
            _turn_upright(image)
            return _as_rgb(image, param)
    except (SDBentoError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise InvalidParameter(
            f"{param} cannot be decoded as an image; accepted is {ACCEPTED}", param=param
        ) from error
    except Exception as error:  # damaged files make PIL raise nearly everything
        reason = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise InvalidParameter(
            f"{param} cannot be decoded as an image: {reason}", param=param
        ) from error


def _from_base64(text: str, settings: Settings, param: str) -> bytes:
    try:
        encoded = _unescaped(text).encode("ascii")
        encoded = encoded.translate(_URLSAFE, delete=b" \t\r\n").rstrip(b"=")
        _check_bytes(len(encoded) * 3 // 4, settings, param)
        data = binascii.a2b_base64(encoded + b"=" * (-len(encoded) % 4), strict_mode=True)
    except ValueError as error:  # binascii.Error and UnicodeError are ValueErrors
        raise InvalidParameter(f"{param} must be {ACCEPTED}", param=param) from error
    if not data:
        raise InvalidParameter(f"{param} is empty; it must be {ACCEPTED}", param=param)
    return data


def _unescaped(text: str) -> str:
    if "%" not in text:
        return text
    for escape, character in _ESCAPES.items():
        text = text.replace(escape, character).replace(escape.lower(), character)
    return text


def _check_bytes(num_bytes: int, settings: Settings, param: str) -> None:
    if num_bytes > settings.max_image_bytes:
        raise TooLarge(
            f"{param} has {num_bytes} bytes; the limit is {settings.max_image_bytes} "
            "(SDBENTO_MAX_IMAGE_BYTES)",
            param=param,
        )


def _check_pixels(size: tuple[int, int], settings: Settings, param: str) -> None:
    width, height = size
    limit = PIXELS_FACTOR * settings.max_pixels
    if width * height > limit:
        raise TooLarge(
            f"{param} is {width} × {height} pixels large; the limit is {limit} pixels, "
            f"{PIXELS_FACTOR} × SDBENTO_MAX_PIXELS",
            param=param,
        )
    if max(size) > MAX_SIDE:
        raise TooLarge(
            f"{param} is {width} × {height} pixels large; no side may have more than {MAX_SIDE}",
            param=param,
        )


def _turn_upright(image: Image.Image) -> None:
    """Turn it as its EXIF orientation says, in place: PIL turns it first and then writes the EXIF
    data again, so that it is upright even where PIL cannot do the latter."""
    with suppress(Exception):  # broken EXIF data is no reason to refuse the image
        ImageOps.exif_transpose(image, in_place=True)


def _as_rgb(image: Image.Image, param: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip to 8
        grey = np.asarray(image).clip(0, 0xFFFF) // 0x101
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise InvalidParameter(
            f"{param} has pixels of 32 bits, of unknown range; send 8 or 16", param=param
        )
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def flatten(image: Image.Image) -> Image.Image:
    """Without transparency, in RGB: on white, as a browser would show it."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
