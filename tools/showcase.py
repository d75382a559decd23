"""Draws docs/images/emoji-edits.png, by a server on `emoji`: python -m tools.showcase

On the left a picture, a mask, and what is repainted under it; below a picture, and the same with
margins. On the right that picture after a second pass at twice the size. At the bottom the LoRA.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

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
PENGUIN = {"prompt": "a penguin", "seed": 1}
OUTLINE = {"lora": [{"model_id": "emoji-outline"}]}
SECOND_PASS = {"scale": 2.0, "strength": 0.5}


def make(client: Client, **fields: Any) -> Image.Image:
    return client.generate(**fields).image.to_pil().convert("RGB")


def draw(client: Client) -> Image.Image:
    pair, mask, subject = make(client, **PAIR), half_mask(SIDE, SIDE), make(client, **SUBJECT)
    edited = make(client, **OTHER_PAIR, image=data_uri(pair), mask_image=data_uri(mask))
    wide = make(client, **BACKGROUND, image=data_uri(subject), outpaint=MARGINS)
    large = make(client, **SUBJECT, hires=SECOND_PASS)
    outlined = [make(client, **fields, **OUTLINE) for fields in (CAT, PENGUIN)]
    rows = [[pair, mask, edited], [subject, wide], [make(client, **CAT), *outlined]]
    sheet = Image.new("RGB", (3 * (SIDE + GAP) + 2 * SIDE, 3 * SIDE + 2 * GAP), "lightgrey")
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
