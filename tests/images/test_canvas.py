from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sdbento.errors import InvalidParameter
from sdbento.images.canvas import extend, inpaint_control, prepare_canvas, prepare_control, resized
from tests.support.images import box_mask, gradient, half_mask


@pytest.mark.parametrize("mode", ["stretch", "crop", "fit"])
def test_every_mode_gives_the_size_asked_for(mode: str) -> None:
    canvas = prepare_canvas(gradient(100, 60), 64, 72, mode)  # type: ignore[arg-type]
    assert canvas.pixels.shape == (1, 3, 72, 64)
    assert canvas.pixels.min() >= -1 and canvas.pixels.max() <= 1
    assert canvas.mask is None and canvas.overlay is None


def test_crop_keeps_the_middle_and_fit_keeps_everything() -> None:
    image = Image.new("RGB", (192, 64), "black")
    image.paste("white", (64, 0, 128, 64))
    cropped = prepare_canvas(image, 64, 64, "crop").pixels
    fitted = prepare_canvas(image, 64, 64, "fit").pixels
    assert cropped.mean() > 0.95
    assert (float(fitted[0, 0, 32, 32]), float(fitted[0, 0, 32, 2])) == (1, -1)


def test_an_image_that_is_too_thin_cannot_be_fitted() -> None:
    with pytest.raises(InvalidParameter, match="3000 x 40 cannot be fitted into 64 x 64"):
        prepare_canvas(gradient(3000, 40), 64, 64, "fit")
    assert prepare_canvas(gradient(3000, 40), 64, 64, "crop").pixels.shape[-1] == 64


def test_nor_can_it_be_cropped_if_the_whole_would_become_too_large() -> None:
    """512 x 512 of a line of 20,000 pixels are cut out of 10 million by 512."""
    with pytest.raises(InvalidParameter, match="20000 x 1 cannot be cropped to 512 x 512"):
        prepare_canvas(Image.new("L", (20_000, 1)), 512, 512, "crop", blur=3, mask=half_mask())
    with pytest.raises(InvalidParameter, match="nearly all of it would be cut off"):
        prepare_control(Image.new("L", (1, 20_000)), 512, 512, "crop")
    with pytest.raises(InvalidParameter, match="nearly all of it would be cut off"):
        resized(Image.new("L", (1, 20_000)), 512, 512, "crop")


def test_a_mask_is_black_and_white_whatever_was_sent() -> None:
    grey = Image.linear_gradient("L").resize((64, 64))
    mask = prepare_canvas(gradient(), 64, 64, mask=grey).mask
    assert mask is not None
    assert set(mask.unique().tolist()) == {0.0, 1.0}


def test_without_blur_and_crop_every_pixel_is_the_models() -> None:
    assert prepare_canvas(gradient(), 64, 64, mask=half_mask()).overlay is None


def test_blur_fades_into_the_original() -> None:
    canvas = prepare_canvas(gradient(), 64, 64, mask=half_mask(), blur=4)
    assert canvas.overlay is not None
    result = np.asarray(canvas.overlay.apply(Image.new("RGB", (64, 64), "black")), np.int16)
    original = np.asarray(gradient(), np.int16)
    assert (result[:, :16] == original[:, :16]).all()
    assert (result[:, 50:] == 0).all()
    edge = result[5, 24:40, 1] / np.maximum(original[5, 24:40, 1], 1)
    assert 0.2 < edge[8] < 0.8


def test_only_the_masked_region_is_cut_out_and_put_back() -> None:
    mask = box_mask(160, 120, (50, 40, 80, 70))
    canvas = prepare_canvas(gradient(160, 120), 64, 64, mask=mask, crop_padding=8)
    assert canvas.box == (42, 32, 88, 78)
    assert canvas.overlay is not None
    result = np.asarray(canvas.overlay.apply(Image.new("RGB", (64, 64), "red")))
    assert result.shape == (120, 160, 3)
    assert (result[45:65, 55:75] == [255, 0, 0]).all()
    assert (result[:38] == np.asarray(gradient(160, 120))[:38]).all()


def test_cutting_out_the_masked_region_needs_a_mask_that_is_not_black() -> None:
    with pytest.raises(InvalidParameter, match="nothing white"):
        prepare_canvas(gradient(), 64, 64, mask=Image.new("L", (64, 64)), crop_padding=4)


def test_a_mask_is_resized_to_the_image() -> None:
    canvas = prepare_canvas(gradient(128, 128), 64, 64, mask=half_mask(32, 32))
    assert canvas.mask is not None
    assert (canvas.mask[..., :30] == 0).all() and (canvas.mask[..., 34:] == 1).all()


def test_outpainting_adds_margins_to_repaint_and_continues_the_image_into_them() -> None:
    image, mask = extend(gradient(64, 48), None, (16, 0, 0, 8), overlap=4)
    assert image.size == mask.size == (80, 56)
    repaint = np.asarray(mask)
    assert (repaint[:, :20] == 255).all() and (repaint[-12:] == 255).all()
    assert (repaint[:44, 20:] == 0).all()
    pixels = np.asarray(image)
    assert (pixels[:48, 16:] == np.asarray(gradient(64, 48))).all()
    assert (pixels[:48, 0] == pixels[:48, 16]).all()


def test_outpainting_keeps_a_mask_that_was_sent() -> None:
    _, mask = extend(gradient(), box_mask(64, 64, (30, 30, 40, 40)), (8, 0, 0, 0), overlap=0)
    repaint = np.asarray(mask)
    assert (repaint[30:40, 38:48] == 255).all() and (repaint[:, :8] == 255).all()
    assert (repaint[:30, 8:] == 0).all()


def test_a_control_image_lies_between_0_and_1_and_follows_the_cut() -> None:
    whole = prepare_control(gradient(160, 120), 64, 64, "stretch")
    part = prepare_control(gradient(160, 120), 64, 64, "stretch", (42, 32, 88, 78))
    assert whole.shape == part.shape == (1, 3, 64, 64)
    assert whole.min() >= 0 and whole.max() <= 1
    assert not torch.equal(whole, part)


def test_the_control_image_of_inpainting_is_minus_1_where_it_is_repainted() -> None:
    canvas = prepare_canvas(gradient(), 64, 64, mask=half_mask())
    control = inpaint_control(canvas)
    assert (control[..., 34:] == -1).all()
    assert control[..., :30].min() >= 0
    with pytest.raises(InvalidParameter, match="needs a mask_image"):
        inpaint_control(prepare_canvas(gradient(), 64, 64))
