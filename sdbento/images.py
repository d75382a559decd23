"""Pictures to bytes and base64, with the generation parameters embedded. No torch, no sockets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

QUALITY = 95  # of JPEG and WebP
USER_COMMENT = 0x9286  # the EXIF tag that JPEG and WebP carry parameters in
EXIF_IFD = 0x8769
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def encode(
    image: Image.Image, output_format: str, parameters: Mapping[str, Any] | None = None
) -> bytes:
    """`image` as a file in `output_format` (a key of MEDIA_TYPES).

    `parameters` go in as JSON: a PNG text chunk "parameters", or the EXIF user comment.
    """
    buffer = BytesIO()
    text = json.dumps(parameters) if parameters else None
    if output_format == "png":
        image.save(buffer, "PNG", pnginfo=_png_info(text), compress_level=1)
    else:
        image.save(buffer, output_format.upper(), quality=QUALITY, exif=_exif(text))
    return buffer.getvalue()


def _png_info(text: str | None) -> PngInfo | None:
    if text is None:
        return None
    info = PngInfo()
    info.add_itxt("parameters", text)
    return info


def _exif(text: str | None) -> Image.Exif:
    exif = Image.Exif()
    if text is not None:
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif
