"""What an image file says of how its image was made, in PNG, JPEG and WebP.

AUTOMATIC1111's infotext is where the web UI has it, so that other programs find it: in the text
chunk "parameters" of a PNG, else in the EXIF user comment. Our own parameters are beside it, as
JSON in a chunk "sdbento", else in the EXIF maker note.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from sdbento.errors import InvalidParameter
from sdbento.images import structure

INFOTEXT, PARAMETERS = "parameters", "sdbento"  # chunks of a PNG
MAX_EXIF_BYTES = 65_533 - len(b"Exif\0\0")  # what fits into the one segment that a JPEG has for it
MAX_PIXELS = 8192**2  # a small file may hold a picture that no memory does
_UNICODE, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"  # encodings of a user comment
_OURS = b"sdbento\0"  # begins our maker note


@dataclass(frozen=True)
class Metadata:
    """How an image was made: AUTOMATIC1111's `infotext`, and our `parameters`, as JSON has them."""

    infotext: str | None = None
    parameters: Mapping[str, Any] | None = None

    def as_png_info(self) -> PngInfo:
        info = PngInfo()
        if self.infotext:
            info.add_itxt(INFOTEXT, self.infotext)
        if self.parameters:
            info.add_itxt(PARAMETERS, json.dumps(self.parameters))
        return info

    def as_exif(self) -> bytes:
        """EXIF data; if the texts are too long for it, the infotext alone, or nothing."""
        for kept in (self, replace(self, parameters=None), Metadata()):
            exif = Image.Exif()
            tags = exif.get_ifd(ExifTags.IFD.Exif)
            if kept.infotext:
                tags[ExifTags.Base.UserComment] = _UNICODE + kept.infotext.encode("utf-16-be")
            if kept.parameters:
                text = json.dumps(kept.parameters, ensure_ascii=False)
                tags[ExifTags.Base.MakerNote] = _OURS + text.encode()
            data = exif.tobytes()
            if len(data) <= MAX_EXIF_BYTES:
                break
        return data


def read_metadata(data: bytes) -> Metadata:
    """What an image file of ours, or of the web UI, says of how it was made.

    Raises InvalidParameter if `data` is no image that can be read.
    """
    try:
        with structure.open_image(data, ["PNG", "JPEG", "WEBP"], param="image") as image:
            text, ours = _png_texts(image) if image.format == "PNG" else _exif_texts(image)
    except InvalidParameter:
        raise
    except Exception as error:  # damaged files make PIL raise nearly everything
        raise InvalidParameter("this is no PNG, JPEG or WebP file that can be read") from error
    parameters = _as_json(ours)
    if parameters is None and (older := _as_json(text)) is not None:
        return Metadata(None, older)  # our first versions had them where the infotext is now
    return Metadata(text, parameters)


def _png_texts(image: Image.Image) -> tuple[str | None, str | None]:
    if INFOTEXT not in image.info and image.width * image.height <= MAX_PIXELS:
        image.load()  # some programs write their chunks behind the pixels
    texts = [image.info.get(name) for name in (INFOTEXT, PARAMETERS)]
    infotext, ours = (text if isinstance(text, str) else None for text in texts)
    return infotext, ours


def _exif_texts(image: Image.Image) -> tuple[str | None, str | None]:
    structure.check_exif(image, param="image")
    tags = image.getexif().get_ifd(ExifTags.IFD.Exif)
    comment, note = (tags.get(tag) for tag in (ExifTags.Base.UserComment, ExifTags.Base.MakerNote))
    text = ours = None
    if isinstance(note, bytes) and note.startswith(_OURS):
        ours = note.removeprefix(_OURS).decode("utf-8", "replace")
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        text = _utf_16(comment.removeprefix(_UNICODE), certainly_big=ours is not None)
    elif isinstance(comment, bytes) and comment.startswith(_ASCII):
        text = comment.removeprefix(_ASCII).decode("utf-8", "replace")
    return text, ours


def _utf_16(data: bytes, *, certainly_big: bool) -> str:
    """The web UI writes big endian, as we do, other programs what their machine has: in most
    prompts every second byte is 0. (In "一" it is the other one.)"""
    little = not certainly_big and data[1::2].count(0) > data[::2].count(0)
    return data.decode("utf-16-le" if little else "utf-16-be", "replace")


def _as_json(text: str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
