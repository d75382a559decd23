"""Images to send with requests: drawn here, so that their content is known."""

from __future__ import annotations

from base64 import b64encode

import numpy as np
from PIL import Image, ImageDraw

from sdbento.images import codec


def gradient(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """Smooth colours that differ everywhere, and a shape with sharp edges."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = np.stack([np.sin(3 * x + seed), np.cos(4 * y), np.sin(5 * (x + y))], axis=-1)
    image = Image.fromarray(((waves + 1) * 127.5).astype("uint8"))
    ImageDraw.Draw(image).rectangle(
        (width // 4, height // 4, width // 2, height // 2), fill="yellow"
    )
    return image


def half_mask(width: int = 64, height: int = 64) -> Image.Image:
    """White on the right half."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def box_mask(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, box)
    return mask


def base64(image: Image.Image) -> str:
    return b64encode(codec.encode(image, "png")).decode("ascii")


def data_uri(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64(image)}"
