"""What a server on `emoji` does beside text to image, measured on its images, over HTTP."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sdbento.images.preprocessors import preprocess
from tests.support.images import data_uri, half_mask
from tests.support.server import Server, generated

Pixels = NDArray[np.int16]
BLUE = (45, 90, 215)
APPLE: dict[str, Any] = {
    "model": "emoji",
    "prompt": "a red apple on a blue background",
    "seed": 1,
}


def is_blue(image: Pixels) -> NDArray[np.bool_]:
    near: NDArray[np.bool_] = np.abs(image - BLUE).max(axis=-1) < 60
    return near


def test_the_lora_outline_empties_the_apple(server: Server) -> None:
    [plain] = generated(server, **APPLE)
    [drawn] = generated(server, **APPLE, lora={"model_id": "emoji-outline"})
    middle = np.s_[48:80, 48:80]
    assert is_blue(plain[middle]).mean() < 0.1
    assert is_blue(drawn[middle]).mean() > 0.6
    assert is_blue(drawn).mean() < 0.97, "there is nothing left but the background"


def test_the_lora_pixel_art_draws_blocks(server: Server) -> None:
    """Most of what changes between neighbouring pixels changes where blocks of 8 meet."""
    [plain] = generated(server, **APPLE)
    [drawn] = generated(server, **APPLE, lora={"model_id": "emoji-pixel-art"})
    assert on_blocks(drawn) > 1.2 * on_blocks(plain)


def on_blocks(image: Pixels) -> float:
    across, along = (np.abs(np.diff(image, axis=axis)) for axis in (0, 1))
    met = across[7::8].sum() + along[:, 7::8].sum()
    return float(met / (across.sum() + along.sum()))


def test_a_heart_follows_the_drawn_edges(server: Server) -> None:
    drawing = Image.new("RGB", (128, 128), BLUE)
    ImageDraw.Draw(drawing).ellipse((10, 40, 118, 88), fill="red")
    wanted = ~is_blue(np.asarray(drawing, np.int16))

    def overlap(image: Pixels) -> float:
        shown = ~is_blue(image)
        return float((shown & wanted).sum() / (shown | wanted).sum())

    heart = {"model": "emoji", "prompt": "a heart on a blue background", "seed": 1}
    edges = data_uri(preprocess("canny", drawing))
    control = {"type": "canny", "image": edges, "conditioning_scale": 1.5}
    [free] = generated(server, **heart)
    [steered] = generated(server, **heart, controlnet=control)
    assert overlap(steered) > 0.8 > overlap(free) + 0.05


def test_other_words_change_little(server: Server) -> None:
    [plain] = generated(server, **APPLE)
    worded = f"a photo of {APPLE['prompt']}, highly detailed, 4k"
    [same] = generated(server, **APPLE | {"prompt": worded})
    [other] = generated(server, **APPLE | {"prompt": "a robot on a blue background"})
    near, far = (np.abs(image - plain).mean() for image in (same, other))
    assert near < far / 2


def test_a_masked_half_becomes_something_else(server: Server) -> None:
    [pair] = generated(server, model="emoji", prompt="a fox next to a bear", seed=1)
    image = data_uri(Image.fromarray(pair.astype("uint8")))
    mask = data_uri(half_mask(128, 128))
    fields = {"model": "emoji", "prompt": "a fox next to a penguin", "seed": 1}
    [edited] = generated(server, **fields, image=image, mask_image=mask, mask_blur=2)
    assert np.abs(edited[:, :56] - pair[:, :56]).max() == 0
    assert np.abs(edited[:, 72:] - pair[:, 72:]).mean() > 10


def test_margins_continue_the_background(server: Server) -> None:
    [apple] = generated(server, **APPLE)
    image = data_uri(Image.fromarray(apple.astype("uint8")))
    [wide] = generated(server, **APPLE, image=image, outpaint={"right": 64})
    assert wide.shape == (128, 192, 3)
    assert is_blue(wide[:, 136:]).mean() > 0.9


@pytest.mark.parametrize(("width", "height"), [(128, 192), (256, 256), (512, 512)])
def test_larger_pictures_show_one_thing_in_the_middle(
    server: Server, width: int, height: int
) -> None:
    """Sizes that programs ask for whose users have not chosen one."""
    [image] = generated(server, **APPLE, width=width, height=height)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    middle, border = slice(3 * side // 8, 5 * side // 8), side // 12
    assert is_blue(square[middle, middle]).mean() < 0.1
    assert is_blue(square[:border]).mean() > 0.9 and is_blue(square[-border:]).mean() > 0.9


def test_a_second_pass_keeps_the_picture(server: Server) -> None:
    [small] = generated(server, **APPLE)
    [large] = generated(server, **APPLE, hires={"scale": 2.0, "strength": 0.5})
    assert large.shape == (256, 256, 3)
    halved = Image.fromarray(large.astype("uint8")).resize((128, 128), Image.Resampling.BOX)
    assert np.abs(np.asarray(halved, np.int16) - small).mean() < 20
