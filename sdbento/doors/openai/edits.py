"""The images of edits and variations as fields of a request: image, mask and strength.

OpenAI repaints where a mask, or without one the image itself, is fully transparent; we repaint
where a mask is white. An image without holes is changed as a whole.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdbento.doors.openai.body import ImageBody
from sdbento.errors import InvalidParameter
from sdbento.images import codec
from sdbento.outbound import is_url

if TYPE_CHECKING:
    from sdbento.app import App

FAITHFUL_STRENGTH = 0.5  # of edits whose input_fidelity is high
VARIATION_STRENGTH = 0.7

_REPAINT = [255] + [0] * 255  # by alpha


async def edit_inputs(app: App, body: ImageBody, image: str, mask: str | None) -> dict[str, Any]:
    """`image` and `mask`: URL, data URI or base64. Raises errors of the tree."""
    if mask is not None:
        holes = await asyncio.to_thread(_holes, await app.read_image(mask, param="mask"))
        if holes is None:
            raise InvalidParameter(
                "mask must be fully transparent where the image is to be repainted, and has no "
                "such pixel; a mask that is white there goes into mask_image",
                param="mask",
            )
        return {"image": image, "mask_image": holes}
    if body.mask_image is not None or body.outpaint is not None or body.upscale is not None:
        return {"image": image}
    pixels = await app.read_image(image, param="image")
    if is_url(image):  # which need not be fetched again
        image = await asyncio.to_thread(_as_base64, pixels)
    if holes := await asyncio.to_thread(_holes, pixels):
        return {"image": image, "mask_image": holes}
    return {"image": image, "strength": _strength(body)}


def _strength(body: ImageBody) -> float | None:
    faithful = body.strength is None and body.input_fidelity == "high"
    return FAITHFUL_STRENGTH if faithful else body.strength


def variation_inputs(body: ImageBody, image: str) -> dict[str, Any]:
    return {"image": image, "strength": body.strength or VARIATION_STRENGTH}


def _holes(image: Image.Image) -> str | None:
    """A mask that is white where `image` is fully transparent, as base64; None: nowhere."""
    if not image.has_transparency_data:
        return None
    mask = image.convert("RGBA").getchannel("A").point(_REPAINT)
    return _as_base64(mask) if mask.getbbox() else None


def _as_base64(image: Image.Image) -> str:
    return b64encode(codec.encode(image, "png")).decode("ascii")
