"""Draws docs/images/emoji-edits.png, by a server on `emoji`: python -m tools.showcase

On the left a picture, a mask, and what is repainted under it; below a picture, and the same with
margins. On the right that picture after a second pass at twice the size. Below a picture and the
same with each LoRA; at the bottom drawings, and what the ControlNet makes of their edges.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sdbento.client import Client
from tests.support.images import data_uri, half_mask
from tests.support.server import serving

TARGET = Path(__file__).parent.parent / "docs" / "images" / "emoji-edits.png"
SIDE, GAP = 128, 8
PAIR = {"prompt": "a red apple and a green apple", "seed": 1}
OTHER_PAIR = {"prompt": "a red apple and a penguin", "seed": 1}
SUBJECT = {"prompt": "a yellow heart on a purple background", "seed": 1}
BACKGROUND = {"prompt": "on a purple background", "seed": 1}
MARGINS = {"left": 32, "right": 32}
CAT = {"prompt": "a cat face, flat style", "seed": 1}
SUNFLOWER = {"prompt": "a sunflower", "seed": 1}
LORAS = ("emoji-outline", "emoji-pixel-art")
STEERED = {"prompt": "a heart on a yellow background", "seed": 1}
SECOND_PASS = {"scale": 2.0, "strength": 0.5}


def make(client: Client, **fields: Any) -> Image.Image:
    return client.generate(**fields).image.to_pil().convert("RGB")


def with_lora(client: Client, name: str, fields: dict[str, Any]) -> Image.Image:
    return make(client, **fields, lora=[{"model_id": name}])


def follow(client: Client, drawing: Image.Image, fields: dict[str, Any]) -> Image.Image:
    control = {"type": "canny", "image": data_uri(drawing), "preprocess": True}
    return make(client, **fields, controlnet=[control | {"conditioning_scale": 1.5}])


def drawings() -> list[Image.Image]:
    """An ellipse, a cross, and a square."""
    sheets = [Image.new("RGB", (SIDE, SIDE), "white") for _ in range(3)]
    ellipse, cross, square = (ImageDraw.Draw(sheet) for sheet in sheets)
    ellipse.ellipse((10, 40, 118, 88), fill="black")
    cross.rectangle((50, 16, 78, 112), fill="black")
    cross.rectangle((16, 50, 112, 78), fill="black")
    square.rectangle((30, 30, 98, 98), fill="black")
    return sheets


def draw(client: Client) -> Image.Image:
    pair, mask, subject = make(client, **PAIR), half_mask(SIDE, SIDE), make(client, **SUBJECT)
    edited = make(client, **OTHER_PAIR, image=data_uri(pair), mask_image=data_uri(mask))
    wide = make(client, **BACKGROUND, image=data_uri(subject), outpaint=MARGINS)
    large = make(client, **SUBJECT, hires=SECOND_PASS)
    styled = [
        image
        for fields in (CAT, SUNFLOWER)
        for image in (make(client, **fields), *(with_lora(client, name, fields) for name in LORAS))
    ]
    steered = [
        image for drawing in drawings() for image in (drawing, follow(client, drawing, STEERED))
    ]
    rows = [[pair, mask, edited], [subject, wide], styled, steered]
    sheet = Image.new("RGB", (6 * (SIDE + GAP) - GAP, 4 * SIDE + 3 * GAP), "lightgrey")
    for number, row in enumerate(rows):
        top, left = number * (SIDE + GAP), 0
        for image in row:
            sheet.paste(image, (left, top))
            left += image.width + GAP
    sheet.paste(large, (3 * (SIDE + GAP), GAP // 2))
    return sheet


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), SD_MODEL="emoji") as server,
        Client(server.url) as client,
    ):
        server.wait_until_ready()
        draw(client).save(TARGET)
    print(TARGET)


if __name__ == "__main__":
    main()
