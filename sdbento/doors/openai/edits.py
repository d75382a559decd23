"""What edits and variations are made of, as fields of a request: image, mask and strength.

OpenAI repaints where a mask, or without one the image itself, is fully transparent; we repaint
where a mask is white. An image without holes is changed as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdbento.doors.openai.body import ImageBody, VariationBody
from sdbento.doors.openai.order import Order
from sdbento.doors.openai.parts import Parts
from sdbento.errors import InvalidParameter
from sdbento.images import codec
from sdbento.outbound.urls import is_url

if TYPE_CHECKING:
    from sdbento.app import App

FAITHFUL_STRENGTH = 0.5  # of edits whose input_fidelity is high
VARIATION_STRENGTH = 0.7

_REPAINT = [255] + [0] * 255  # by alpha


async def with_images(app: App, order: Order, sent: Parts) -> Order:
    """The order with the image that it is about, and with warnings of what is not used of `sent`.

    Raises errors of the tree.
    """
    body, image = order.body, sent.images[0]
    if isinstance(body, VariationBody):
        fields = _variation(body)
    elif sent.mask is not None:
        fields = {"mask_image": await _as_mask(app, sent.mask)}
    else:
        fields = await _edit(app, body, image)
    return order.with_fields(**{"image": image} | fields).with_warnings(*_unused(body, sent))


def _variation(body: ImageBody) -> dict[str, Any]:
    if body.strength is not None or _says_what_changes(body):
        return {}
    return {"strength": VARIATION_STRENGTH}


async def _as_mask(app: App, mask: str) -> str:
    holes = await app.image_threads.run(_holes, await app.read_image(mask, param="mask"))
    if holes is None:
        raise InvalidParameter(
            "mask must be fully transparent where the image is to be repainted, and has no "
            "such pixel; a mask that is white there goes into mask_image",
            param="mask",
        )
    return holes


async def _edit(app: App, body: ImageBody, image: str) -> dict[str, Any]:
    """Of an edit without a mask of OpenAI's kind."""
    if _says_what_changes(body):
        return {}
    pixels = await app.read_image(image, param="image")
    if is_url(image):  # which need not be fetched again
        image = await app.image_threads.run(codec.as_base64, pixels)
    if holes := await app.image_threads.run(_holes, pixels):
        return {"image": image, "mask_image": holes}
    return {"image": image, "strength": _strength(body)}


def _says_what_changes(body: ImageBody) -> bool:
    """Whether a field of ours does. Then nothing is added to what the request says."""
    return any(given is not None for given in (body.mask_image, body.outpaint, body.upscale))


def _strength(body: ImageBody) -> float | None:
    faithful = body.strength is None and body.input_fidelity == "high"
    return FAITHFUL_STRENGTH if faithful else body.strength


def _unused(body: ImageBody, sent: Parts) -> Iterator[str]:
    if len(sent.images) > 1:
        yield f"only the first of {len(sent.images)} images was used"
    if sent.mask is None:
        return
    if isinstance(body, VariationBody):
        yield "mask was not used: variations are of the whole image; edits take a mask"
    elif body.mask_image is not None:
        yield "mask_image was not used: mask says where to repaint"


def _holes(image: Image.Image) -> str | None:
    """A mask that is white where `image` is fully transparent, as base64; None: nowhere."""
    if not image.has_transparency_data:
        return None
    mask = image.convert("RGBA").getchannel("A").point(_REPAINT)
    return codec.as_base64(mask) if mask.getbbox() else None
